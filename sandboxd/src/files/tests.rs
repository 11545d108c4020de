//! Paths that would lead out, against a tree that is not the whole file system, and against one that changes meanwhile.

use std::{
    fs::{self, File},
    io::Read as _,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{Mode, OFlags};
use sandgate_api::agent::AgentErrorCode;
use tempfile::TempDir;

use super::{
    Caller, Tree, copy, remove,
    tree::{self, checked},
    write::Replacement,
};

/// A root with something beside it that nobody may reach.
struct World {
    tree: Tree,
    root: PathBuf,
    outside: PathBuf,
    _folder: TempDir,
}

fn world() -> World {
    let folder = tempfile::tempdir().expect("a folder");
    let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
    for directory in [&root, &outside] {
        fs::create_dir(directory).expect("a directory");
    }
    fs::write(outside.join("secret"), "secret").expect("written");
    fs::write(root.join("file"), "inside").expect("written");
    World {
        tree: Tree::at(&root).expect("a tree"),
        root,
        outside,
        _folder: folder,
    }
}

impl World {
    fn read(&self, path: &str) -> Result<String, AgentErrorCode> {
        let file = self.tree.file(Path::new(path)).map_err(|refusal| refusal.code)?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text).expect("text");
        Ok(text)
    }

    fn write(&self, path: &str, text: &str) -> Result<(), AgentErrorCode> {
        let write = || {
            let mut file = Replacement::begin(&self.tree, &checked(path)?, None)?;
            file.write(text.as_bytes())?;
            file.finish()
        };
        write().map_err(|refusal| refusal.code)
    }

    fn secret(&self) -> String {
        fs::read_to_string(self.outside.join("secret")).expect("it is still there")
    }
}

#[test]
fn no_link_leads_out_of_the_tree() {
    let world = world();
    let outside = world.outside.to_str().expect("text");
    symlink("../outside/secret", world.root.join("up")).expect("a link");
    symlink(format!("{outside}/secret"), world.root.join("absolute")).expect("a link");
    symlink("../../../../../../../../../../..", world.root.join("far")).expect("a link");
    symlink("/", world.root.join("top")).expect("a link");
    fs::create_dir(world.root.join("deep")).expect("a directory");
    symlink("../../outside", world.root.join("deep/door")).expect("a link");
    for path in [
        "/up",
        "/absolute",
        "/deep/door/secret",
        "/far/outside/secret",
        "/top/up",
    ] {
        assert_eq!(world.read(path), Err(AgentErrorCode::NotFound), "{path}");
    }
    // `/` is the tree's, also for links.
    assert_eq!(world.read("/top/file").as_deref(), Ok("inside"));
    assert_eq!(world.read("/far/file").as_deref(), Ok("inside"));
    // What is written lands inside, where the link leads when the tree is all there is.
    for path in ["/up", "/absolute", "/deep/door/secret"] {
        assert_eq!(world.write(path, "written"), Ok(()), "{path}");
        assert_eq!(world.read(path).as_deref(), Ok("written"), "{path}");
    }
    assert_eq!(world.secret(), "secret");
    assert_eq!(fs::read_dir(&world.outside).expect("a directory").count(), 1);
}

/// Without openat2 the same is found and the same refused.
#[test]
fn step_by_step_is_the_same_way() {
    let world = world();
    fs::create_dir_all(world.root.join("d/deep")).expect("directories");
    fs::write(world.root.join("d/deep/file"), "x").expect("written");
    for (link, target) in [
        ("up", "../outside/secret"),
        ("far", "../../../../../.."),
        ("top", "/"),
        ("door", "d/deep"),
        ("back", "/door/../deep/./file"),
        ("circle", "circle"),
        ("dangling", "d/absent"),
    ] {
        symlink(target, world.root.join(link)).expect("a link");
    }
    let root = rustix::fs::open(&world.root, OFlags::PATH, Mode::empty()).expect("the root");
    let seen = |opened: std::io::Result<OwnedFd>| match opened {
        Ok(opened) => {
            let found = rustix::fs::fstat(&opened).expect("it is open");
            Ok((found.st_dev, found.st_ino))
        }
        Err(error) => Err(error.raw_os_error()),
    };
    for path in [
        "/",
        "/file",
        "/d",
        "/d/deep/file",
        "/up",
        "/far",
        "/far/file",
        "/top/top/file",
        "/door/file",
        "/back",
        "/circle",
        "/circle/x",
        "/dangling",
        "/file/x",
        "/absent",
        "/d/absent/x",
        "/top/far/door",
    ] {
        for flags in [OFlags::PATH, OFlags::RDONLY, OFlags::RDONLY | OFlags::DIRECTORY] {
            let path = Path::new(path);
            let resolve = rustix::fs::ResolveFlags::IN_ROOT | rustix::fs::ResolveFlags::NO_MAGICLINKS;
            let by_kernel = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve);
            let by_steps = tree::walk(&root, path, flags);
            let expected = seen(by_kernel.map_err(Into::into));
            assert_eq!(seen(by_steps), expected, "{} {flags:?}", path.display());
        }
    }
    let root = rustix::fs::open("/", OFlags::PATH, Mode::empty()).expect("the root");
    for path in [
        "/proc/self/environ",
        "/proc/self/root/etc",
        "/proc/1/fd/0",
        "/dev/fd/0",
        "/proc",
    ] {
        assert!(
            tree::walk(&root, Path::new(path), OFlags::PATH).is_err(),
            "{path}"
        );
    }
}

#[test]
fn links_in_a_circle_end() {
    let world = world();
    symlink("b", world.root.join("a")).expect("a link");
    symlink("a", world.root.join("b")).expect("a link");
    assert_eq!(world.read("/a"), Err(AgentErrorCode::Invalid));
    assert_eq!(world.write("/a", "x"), Err(AgentErrorCode::Invalid));
}

#[test]
fn what_proc_shows_is_nobodys() {
    let tree = Tree::at(Path::new("/")).expect("a tree");
    let folder = tempfile::tempdir().expect("a folder");
    let link = folder.path().join("innocent");
    symlink("/proc/self/environ", &link).expect("a link");
    let own = File::open(folder.path()).expect("a directory");
    let through = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own));
    for path in [
        "/proc/self/environ",
        "/proc/thread-self/mem",
        "/proc/1/maps",
        "/proc/kcore",
        "/proc/version",
        "/proc/self/exe",
        "/proc/self/root/etc/passwd",
        "/proc/self/cwd",
        &through,
        &format!("{through}/innocent"),
        "/dev/fd/0",
        link.to_str().expect("text"),
    ] {
        let refused = tree.file(Path::new(path)).expect_err(path);
        // A machine may lack one of them.
        let absent = refused.code == AgentErrorCode::NotFound && !Path::new(path).exists();
        assert!(
            absent
                || matches!(
                    refused.code,
                    AgentErrorCode::PermissionDenied | AgentErrorCode::Invalid
                ),
            "{path}: {refused:?}"
        );
    }
    for path in [
        "/proc",
        "/proc/self",
        "/proc/self/fd",
        "/proc/1/root",
        "/proc/self/cwd",
    ] {
        assert!(tree.directory(Path::new(path)).is_err(), "{path}");
        let write = Replacement::begin(&tree, &Path::new(path).join("x"), None).map(drop);
        assert!(write.is_err(), "{path}");
    }
    let begun = Replacement::begin(&tree, Path::new("/proc/self/oom_score_adj"), None);
    assert!(begun.is_err());
    let through = Path::new(&through).join("planted");
    assert!(Replacement::begin(&tree, &through, None).is_err());
    assert!(!folder.path().join("planted").exists());
}

/// While another thread swaps a directory and a link to the outside, nothing is read, written or removed there.
#[tokio::test]
async fn a_swapping_thread_opens_no_way_out() {
    let world = world();
    let stop = AtomicBool::new(false);
    let (swapped, aside) = (world.root.join("swapped"), world.root.join("aside"));
    fs::create_dir(&swapped).expect("a directory");
    fs::write(swapped.join("secret"), "harmless").expect("written");
    // Physically a way out: only the tree's root makes it none.
    symlink(&world.outside, &aside).expect("a link");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, &swapped, rustix::fs::CWD, &aside, flags)
                    .expect("swapped");
            }
        });
        for round in 0..2_000 {
            match world.read("/swapped/secret") {
                Ok(text) => assert_ne!(text, "secret", "in round {round}"),
                Err(code) => assert_eq!(code, AgentErrorCode::NotFound, "in round {round}"),
            }
            // Refused or not: what counts is where.
            let _either = world.write("/swapped/written", "x");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(fs::read_dir(&world.outside).expect("a directory").count(), 1);
    assert_eq!(world.secret(), "secret");
}

#[tokio::test]
async fn what_is_removed_while_it_is_swapped_hangs_below_it() {
    let world = world();
    for round in 0..40 {
        let top = world.root.join("top");
        fs::create_dir(&top).expect("a directory");
        for number in 0..50 {
            fs::create_dir(top.join(format!("{number}"))).expect("a directory");
            fs::write(top.join(format!("{number}/secret")), "x").expect("written");
        }
        let stop = AtomicBool::new(false);
        let (swapped, aside) = (top.join("25"), world.root.join(format!("aside{round}")));
        symlink(&world.outside, &aside).expect("a link");
        let caller = Caller::default();
        std::thread::scope(|scope| {
            let swapper = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    // Gone when the directory is.
                    let _gone =
                        rustix::fs::renameat_with(rustix::fs::CWD, &swapped, rustix::fs::CWD, &aside, flags);
                }
            });
            let removed = futures_executor(remove::remove(&world.tree, "/top", true, &caller));
            stop.store(true, Ordering::Relaxed);
            swapper.join().expect("no panic");
            removed.expect("removed");
        });
        assert!(!top.exists());
        assert_eq!(world.secret(), "secret");
    }
}

/// Runs work that waits for nothing.
fn futures_executor<T>(work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(done) = Future::poll(work.as_mut(), &mut context) {
            return done;
        }
    }
}

#[tokio::test]
async fn nesting_takes_no_descriptors() {
    let world = world();
    let mut deepest = Path::new(&world.root).join("n");
    fs::create_dir(&deepest).expect("a directory");
    let mut at = rustix::fs::open(&deepest, OFlags::PATH, Mode::empty()).expect("open");
    for _ in 0..3_000 {
        rustix::fs::mkdirat(&at, "n", Mode::from_raw_mode(0o755)).expect("made");
        at = rustix::fs::openat(&at, "n", OFlags::PATH, Mode::empty()).expect("open");
    }
    drop(at);
    let caller = Caller::default();
    let too_deep = copy::copy(&world.tree, "/n", "/copy", &caller)
        .await
        .expect_err("too deep");
    assert_eq!(too_deep.code, AgentErrorCode::Invalid);
    let names = |world: &World| {
        let mut names: Vec<_> = fs::read_dir(&world.root)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&world), ["file", "n"], "half a copy stays");
    remove::remove(&world.tree, "/n", true, &caller)
        .await
        .expect("removed");
    deepest.pop();
    assert_eq!(names(&world), ["file"]);
}

#[tokio::test]
async fn a_directory_is_copied_as_it_is_and_never_into_itself() {
    let world = world();
    fs::create_dir_all(world.root.join("d/below")).expect("directories");
    fs::write(world.root.join("d/below/script"), "#!").expect("written");
    fs::set_permissions(
        world.root.join("d/below/script"),
        fs::Permissions::from_mode(0o4750),
    )
    .expect("set");
    symlink("below/script", world.root.join("d/link")).expect("a link");
    let caller = Caller::default();
    copy::copy(&world.tree, "/d", "/made/copy", &caller)
        .await
        .expect("copied");
    let copied = world.root.join("made/copy");
    let mode = fs::metadata(copied.join("below/script"))
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o750, "set-user-id was copied");
    assert_eq!(
        fs::read_link(copied.join("link")).expect("a link"),
        Path::new("below/script")
    );
    let code = async |from: &str, to: &str| {
        let refused = copy::copy(&world.tree, from, to, &caller).await;
        refused.map_err(|refusal| refusal.code)
    };
    assert_eq!(code("/d", "/made/copy").await, Err(AgentErrorCode::Exists));
    assert_eq!(code("/d", "/file").await, Err(AgentErrorCode::Exists));
    assert_eq!(code("/file", "/d").await, Err(AgentErrorCode::IsDirectory));
    assert_eq!(code("/d", "/d/below/self").await, Err(AgentErrorCode::Invalid));
    assert_eq!(
        fs::read_dir(world.root.join("d/below")).expect("there").count(),
        1
    );
    assert_eq!(code("/d/link", "/plain").await, Ok(()));
    assert!(
        fs::symlink_metadata(world.root.join("plain"))
            .expect("there")
            .is_file()
    );
    // A caller that is gone leaves nothing behind.
    let gone = Caller::default();
    gone.gone.store(true, Ordering::Relaxed);
    for number in 0..200 {
        fs::write(world.root.join(format!("d/{number}")), "").expect("written");
    }
    assert!(copy::copy(&world.tree, "/d", "/unwanted", &gone).await.is_err());
    let left: Vec<_> = fs::read_dir(&world.root)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name())
        .filter(|name| name == "unwanted" || name.to_string_lossy().starts_with('.'))
        .collect();
    assert_eq!(left, Vec::<std::ffi::OsString>::new());
}
