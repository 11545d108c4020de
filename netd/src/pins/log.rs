//! The pins of one sandbox on disk, so that they outlive netd: one line per pair, appended, written anew
//! when most lines are old. A line that cannot be read is skipped: the pair is then asked for again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use sandgate_policy::DomainName;

use super::{PIN_LIFETIME, PINS_MAX, Pins, Seconds, room::Room};

/// Lines after which the log is written anew.
const LINES_MAX: usize = 4 * PINS_MAX;

/// One sandbox's log. While it cannot be written (a full disk), pins are kept in memory alone, and the log is written
/// anew when [`PinLog::settle`] finds that it can be.
#[derive(Debug)]
pub struct PinLog {
    path: PathBuf,
    /// Open for appending. None: what is on disk lacks something.
    file: Option<File>,
    lines: usize,
}

impl PinLog {
    /// Opens the log at `path`, or begins it, and returns the pairs that have not ended, as far as there is room for
    /// them. None ends later than one that is pinned now, whatever clock its line was written by.
    ///
    /// # Errors
    /// When there is one that cannot be read.
    pub fn open(path: &Path, now: Seconds, room: &Room) -> io::Result<(Self, Pins)> {
        let text = match fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let mut pins = Pins::within(room);
        let latest = now + PIN_LIFETIME.as_secs();
        for (name, address, ends) in text.lines().filter_map(read_line) {
            if ends > now {
                pins.pin_until(&name, address, ends.min(latest));
            }
        }
        let mut log = Self {
            path: path.to_owned(),
            file: None,
            lines: 0,
        };
        log.rewrite(&pins);
        Ok((log, pins))
    }

    /// Adds pairs of one name, all with the same end. `pins` holds them already.
    pub fn append(&mut self, name: &DomainName, addresses: &[IpAddr], ends: Seconds, pins: &Pins) {
        if addresses.is_empty() {
            return;
        }
        if self.lines + addresses.len() > LINES_MAX {
            return self.rewrite(pins);
        }
        let text: String = addresses
            .iter()
            .map(|address| line(name, *address, ends))
            .collect();
        let Some(file) = &mut self.file else { return };
        match file.write_all(text.as_bytes()) {
            Ok(()) => self.lines += addresses.len(),
            Err(error) => self.fall_behind(&error),
        }
    }

    /// Writes the log anew, so that pairs which `pins` no longer holds are forgotten on disk too.
    pub fn rewrite(&mut self, pins: &Pins) {
        match write_anew(&self.path, pins) {
            Ok(file) => {
                self.file = Some(file);
                self.lines = pins.len();
            }
            Err(error) => self.fall_behind(&error),
        }
    }

    /// Makes up for what could not be written.
    pub fn settle(&mut self, pins: &Pins) {
        if self.file.is_none() {
            self.rewrite(pins);
        }
    }

    /// Deletes the log at `path`, if there is one.
    ///
    /// # Errors
    /// When it exists and cannot be deleted.
    pub fn delete(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn fall_behind(&mut self, error: &io::Error) {
        if self.file.take().is_some() {
            tracing::warn!(path = %self.path.display(), %error, "cannot write a pin log; pins made from here on would not outlive netd");
        }
    }
}

fn write_anew(path: &Path, pins: &Pins) -> io::Result<File> {
    let beside = path.with_extension("new");
    let text: String = pins
        .iter()
        .map(|(name, address, ends)| line(name, address, ends))
        .collect();
    let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Half of it would only take room where there is none.
        fs::remove_file(&beside).ok();
    }
    written?;
    OpenOptions::new().append(true).open(path)
}

fn line(name: &DomainName, address: IpAddr, ends: Seconds) -> String {
    format!("{ends} {address} {}\n", name.as_str())
}

fn read_line(line: &str) -> Option<(DomainName, IpAddr, Seconds)> {
    let mut parts = line.split(' ');
    let (ends, address, name) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    Some((
        DomainName::parse(name).ok()?,
        address.parse().ok()?,
        ends.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pin(log: &mut PinLog, pins: &mut Pins, text: &str, last: u8, ends: Seconds) {
        let (name, address) = (
            DomainName::parse(text).expect("a name"),
            IpAddr::from([203, 0, 113, last]),
        );
        pins.pin_until(&name, address, ends);
        log.append(&name, &[address], ends, pins);
    }

    #[test]
    fn what_was_pinned_is_there_after_a_restart_and_what_ended_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        pin(&mut log, &mut pins, "a.test", 1, 100);
        pin(&mut log, &mut pins, "b.test", 2, 10);
        pin(&mut log, &mut pins, "b.test", 2, 200);
        pin(&mut log, &mut pins, "c.test", 3, 20);
        let (_, pins) = PinLog::open(&path, 50, &Room::default()).expect("opened");
        let kept: Vec<_> = pins
            .iter()
            .map(|(name, _, ends)| (name.as_str().to_owned(), ends))
            .collect();
        assert_eq!(kept, [("a.test".to_owned(), 100), ("b.test".to_owned(), 200)]);
    }

    #[test]
    fn what_another_clock_wrote_lives_no_longer_than_what_is_pinned_now() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        // Seconds since 1970, and a day.
        pin(&mut log, &mut pins, "a.test", 1, 1_800_086_400);
        pin(&mut log, &mut pins, "b.test", 2, 2_000);
        let day = PIN_LIFETIME.as_secs();
        let (_, mut pins) = PinLog::open(&path, 1_000, &Room::default()).expect("opened");
        let ends: Vec<Seconds> = pins.iter().map(|(_, _, ends)| ends).collect();
        assert_eq!(ends, [1_000 + day, 2_000]);
        assert_eq!(pins.sweep(1_000 + day, |_| true).len(), 2);
        let (_, pins) = PinLog::open(&path, 1_001 + day, &Room::default()).expect("opened");
        assert!(pins.is_empty(), "the log still has the end of the other clock");
    }

    #[test]
    fn addresses_of_both_families_come_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        let name = DomainName::parse("a.test").expect("a name");
        let both: [IpAddr; 2] = [[203, 0, 113, 1].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()];
        for address in both {
            pins.pin_until(&name, address, 100);
        }
        log.append(&name, &both, 100, &pins);
        let (_, pins) = PinLog::open(&path, 50, &Room::default()).expect("opened");
        assert!(both.iter().all(|address| pins.contains(&name, *address, 50)));
    }

    #[test]
    fn what_could_not_be_written_is_made_up_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("gone").join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        pin(&mut log, &mut pins, "a.test", 1, 100);
        log.settle(&pins);
        fs::create_dir(path.parent().expect("a folder")).expect("made");
        log.settle(&pins);
        pin(&mut log, &mut pins, "b.test", 2, 100);
        assert_eq!(
            PinLog::open(&path, 50, &Room::default()).expect("opened").1.len(),
            2
        );
    }

    #[test]
    fn a_torn_or_foreign_line_costs_only_itself() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        fs::write(
            &path,
            b"100 203.0.113.1 a.test\n\xff\xfe\n100 x b.test\n100 203.0.113.2 c.te",
        )
        .expect("written");
        let (_, pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        assert_eq!(pins.len(), 2);
        assert_eq!(
            PinLog::open(&path, 0, &Room::default()).expect("opened").1.len(),
            2
        );
    }

    #[test]
    fn what_follows_a_line_that_found_no_room_is_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        pin(&mut log, &mut pins, "a.test", 1, 100);
        log.file = Some(OpenOptions::new().append(true).open("/dev/full").expect("opened"));
        pin(&mut log, &mut pins, "b.test", 2, 100);
        assert_eq!(
            PinLog::open(&path, 0, &Room::default()).expect("opened").1.len(),
            1,
            "full"
        );
        log.settle(&pins);
        pin(&mut log, &mut pins, "c.test", 3, 100);
        let (_, pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        let names: Vec<_> = pins.iter().map(|(name, _, _)| name.as_str().to_owned()).collect();
        assert_eq!(names, ["a.test", "b.test", "c.test"]);
    }

    #[test]
    fn the_log_stays_bounded() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("sandbox-1");
        let (mut log, mut pins) = PinLog::open(&path, 0, &Room::default()).expect("opened");
        for step in 0..(3 * LINES_MAX) {
            pin(&mut log, &mut pins, "a.test", 1, step as u64 + 1);
        }
        let lines = fs::read_to_string(&path).expect("read").lines().count();
        assert!(lines <= LINES_MAX, "{lines} lines");
    }
}
