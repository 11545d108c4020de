//! The duties of PID 1, and what a child must look like before it runs foreign code. The only unsafe code here.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::Duration,
};

use nix::{
    pty::{Winsize, openpty},
    sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
    unistd::{Pid, getpid, setsid},
};

use rustix::io::{FdFlags, fcntl_setfd};
use sandgate_api::agent::TerminalSize;

use crate::{children::Children, mark::Mark};

/// The highest real-time signal (signal(7)).
const LAST_SIGNAL: i32 = 64;
/// How long processes may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);

/// Makes this process unreadable for others of its uid, adopts orphans, and undoes what signal settings and
/// open descriptors its starter left.
///
/// # Errors
/// When the kernel refuses.
pub fn harden() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    // Orphans come to PID 1 by themselves; elsewhere (in tests) they must be asked for.
    nix::sys::prctl::set_child_subreaper(true)?;
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o022));
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    for signal in 1..=LAST_SIGNAL {
        restore_default(signal);
    }
    keep_from_children()
}

/// Marks every descriptor but the standard streams to be closed in children. Ours are so from the beginning.
fn keep_from_children() -> io::Result<()> {
    // SAFETY: close_range takes numbers only, and with this flag closes nothing in this process.
    #[expect(unsafe_code, reason = "close_range has no safe form")]
    let answer = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives a signal its default disposition. SIGKILL and SIGSTOP have no other and answer EINVAL. SIGPIPE stays
/// ignored, as the Rust runtime wants it in this process; children get the default.
///
/// libc hides the signals that it uses for itself (32 to 34), and a starter may have left those ignored, too.
fn restore_default(signal: i32) {
    if signal == libc::SIGPIPE {
        return;
    }
    // The kernel's `struct sigaction`: handler (SIG_DFL is 0), flags, restorer, a mask of 64 signals.
    let default = [0_u64; 4];
    // SAFETY: rt_sigaction reads that structure from the second argument, which outlives the call, and writes
    // nothing, as the third is null. The default disposition runs no code of ours.
    #[expect(unsafe_code, reason = "sigaction has no safe form")]
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            default.as_ptr(),
            std::ptr::null::<u64>(),
            size_of::<u64>(),
        );
    }
}

/// Puts `/dev/null` in the place of standard input.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn forget_standard_input() -> io::Result<()> {
    Ok(nix::unistd::dup2_stdin(File::open("/dev/null")?)?)
}

/// Gives the child a session and process group of its own, and a mark that its descendants keep, so that it can be
/// killed with all its like.
pub(crate) fn own_session(command: &mut Command, mark: Mark, has_terminal: bool) {
    let hook = move || {
        setsid()?;
        if has_terminal {
            own_terminal()?;
        }
        mark.put_on_this_process();
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setsid, ioctl and setrlimit are, and turning
    // an errno into an error allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec has no safe form")]
    unsafe {
        command.pre_exec(hook);
    }
}

/// Makes the standard input, a terminal, the one that controls this session.
fn own_terminal() -> io::Result<()> {
    // SAFETY: this ioctl takes a number only.
    #[expect(unsafe_code, reason = "TIOCSCTTY has no safe form for a bare descriptor")]
    let answer = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A new terminal: our side of it, and that of the processes.
pub(crate) fn open_terminal(size: TerminalSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let nix::pty::OpenptyResult { master, slave } = openpty(&window(size), None)?;
    for side in [&master, &slave] {
        fcntl_setfd(side, FdFlags::CLOEXEC)?;
    }
    Ok((master, slave))
}

/// Gives a terminal another size.
pub(crate) fn resize(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let window = window(size);
    // SAFETY: this ioctl reads the structure that the pointer leads to, which outlives the call.
    #[expect(unsafe_code, reason = "TIOCSWINSZ has no safe form")]
    let answer = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const window) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn window(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Ends every process: SIGTERM, a grace period, and the kernel kills the rest when PID 1 ends.
pub async fn end_everything(children: &Children) {
    if getpid().as_raw() == 1 {
        // Every process but this one: only PID 1 may say so, where -1 means its own namespace.
        let _nobody = kill(Pid::from_raw(-1), Signal::SIGTERM);
    } else {
        children.signal_all(rustix::process::Signal::TERM);
    }
    let _stubborn = tokio::time::timeout(GRACE, children.all_gone()).await;
    children.signal_all(rustix::process::Signal::KILL);
}
