//! Limits that bite, and only the one that reaches them.

use std::time::Duration;

use crate::world::{MIB, World, can_run};
use controller::{
    agent::AgentError,
    backend::{BackendError, LaunchSpec},
};
use sandgate_api::agent::{AgentErrorCode, Command as AgentCommand, Exec};

#[tokio::test(flavor = "multi_thread")]
async fn limits_bite_and_only_the_one_that_reaches_them() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let greedy = LaunchSpec {
        cpu_millis: 200,
        memory_bytes: 96 * MIB,
        pids: 32,
        ..world.spec()
    };
    let modest = world.spec();
    world.start(&greedy).await;
    world.start(&modest).await;

    // CPU: two busy processes for three seconds together get a fifth of one CPU.
    let busy = "import os, time\nend = time.time() + 3\nos.fork()\nwhile time.time() < end: pass\n\
        print(os.times().user + os.times().system, flush=True)";
    let spent: f64 = world
        .sh(&greedy, &format!("python3 -c '{busy}'"))
        .await
        .stdout
        .lines()
        .map(|line| line.parse::<f64>().unwrap())
        .sum();
    assert!(
        (0.1..1.0).contains(&spent),
        "{spent} s of CPU in 3 s at 200 thousandths"
    );

    // Processes: a bomb is stopped, the agent still answers, and the neighbour does not notice.
    let bomb = world
        .sh(&greedy, "for i in $(seq 200); do sleep 30 & done; wait")
        .await;
    assert!(
        bomb.stderr.contains("annot fork") || bomb.stderr.contains("temporarily unavailable"),
        "{bomb:?}"
    );
    world.agent(&greedy).await.ping().await.unwrap();
    assert_eq!(
        world
            .sh(
                &modest,
                "for i in $(seq 20); do sleep 0.1 & done; wait; echo done"
            )
            .await
            .stdout,
        "done\n"
    );
    world.backend.destroy(&greedy.sandbox_id).await.unwrap();
    world.start(&greedy).await;
    let forks = "import os, time\nwhile not os.path.exists(\"/workspace/enough\"):\n try: child = os.fork()\n \
        except OSError:\n  time.sleep(0.05)\n  continue\n if child == 0:\n  time.sleep(60)\n  os._exit(0)\nos.killpg(0, 9)";
    let filled = format!("exec python3 -c '{forks}'");
    let (bomb, ()) = tokio::join!(world.sh(&greedy, &filled), async {
        // A busy machine may need a while to fill it.
        loop {
            match world.try_exec(&greedy, shell("true")).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(AgentError::Refused {
                    code: AgentErrorCode::Internal,
                    ..
                }) => break,
                Err(other) => panic!("{other:?}"),
            }
        }
        let agent = world.agent(&greedy).await;
        let written = agent.write_file("/workspace/enough", None, vec![0].into()).await;
        written.unwrap();
    });
    assert_eq!(bomb.code, 137, "{bomb:?}");
    assert_eq!(world.sh(&greedy, "echo free").await.stdout, "free\n");

    // Memory: the hog dies, the agent and the neighbour live.
    let hog = world
        .sh(
            &greedy,
            "exec python3 -c 'x = bytearray(400 * 1024 * 1024); print(len(x))'",
        )
        .await;
    assert_eq!((hog.code, hog.stdout.as_str()), (137, ""), "{hog:?}");
    let shared = world
        .sh(&greedy, "head -c 90M /dev/zero > /dev/shm/x; echo $?")
        .await;
    assert_eq!(shared.stdout, "1\n", "{shared:?}");
    assert_eq!(
        world.sh(&greedy, "rm /dev/shm/x; echo alive").await.stdout,
        "alive\n"
    );
    assert_eq!(world.sh(&modest, "echo alive").await.stdout, "alive\n");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disks_stay_inside_and_the_database_goes_on() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let specs: Vec<LaunchSpec> = (0..3).map(|_| world.spec()).collect();
    for spec in &specs {
        world.start(spec).await;
    }
    // What a database does beside them: small synchronous writes on the same file system.
    let journal = world.config.data_dir.join("journal");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            let mut file = std::fs::File::create(journal)?;
            let mut rows = 0_u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::io::Write::write_all(&mut file, &[7; 4096])?;
                file.sync_data()?;
                rows += 1;
            }
            std::io::Result::Ok(rows)
        }
    });
    let fill = "cat /dev/zero > /workspace/full 2>/tmp/error; \
        for i in $(seq 100000); do touch /workspace/inode$i || break; done 2>/dev/null; \
        echo x > /tmp/more 2>&1; grep -o 'No space left on device' /tmp/error || stat -f -c %a /workspace";
    let (first, second) = tokio::join!(world.sh(&specs[0], fill), world.sh(&specs[1], fill));
    for outcome in [first, second] {
        assert!(
            outcome.stdout.contains("No space left on device") || outcome.stdout.trim() == "0",
            "{outcome:?}"
        );
    }
    let written = world
        .agent(&specs[0])
        .await
        .write_file("/workspace/late", None, vec![0; 65_536].into())
        .await;
    assert!(
        matches!(
            written,
            Err(AgentError::Refused {
                code: AgentErrorCode::NoSpace,
                ..
            })
        ),
        "{written:?}"
    );
    let neighbour = world
        .sh(
            &specs[2],
            "head -c 30M /dev/zero > /workspace/mine && sync && wc -c < /workspace/mine",
        )
        .await;
    assert_eq!(neighbour.stdout, "31457280\n", "{neighbour:?}");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let rows = writer.join().unwrap().expect("the database's writes go on");
    assert!(rows > 10, "{rows} rows");
    // No layer is larger on the node than what was promised.
    for spec in &specs {
        let disk = world
            .config
            .data_dir
            .join(format!("sandboxes/{}/disk.ext4", spec.sandbox_id));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(disk).unwrap()) * 512;
        assert!(blocks <= spec.disk_bytes + MIB, "{blocks}");
    }
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_that_would_not_fit_are_refused_and_leave_nothing() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let file_system = nix::sys::statvfs::statvfs(&world.config.data_dir).unwrap();
    let free = file_system.blocks_available() * file_system.fragment_size();
    let most = LaunchSpec {
        disk_bytes: free - 2048 * MIB,
        ..world.spec()
    };
    // Nothing is written, so the file system itself would take both.
    world.backend.prepare(&most).await.unwrap();
    let second = world
        .backend
        .prepare(&LaunchSpec {
            disk_bytes: 4096 * MIB,
            ..world.spec()
        })
        .await;
    assert!(
        matches!(second, Err(BackendError::NoCapacity { missing: 1.., .. })),
        "{second:?}"
    );
    assert_eq!(world.backend.inventory().await.unwrap().len(), 1);
    world.backend.destroy(&most.sandbox_id).await.unwrap();
    let third = world.spec();
    world.backend.prepare(&third).await.unwrap();
    let again = world.backend.prepare(&third).await;
    assert!(matches!(again, Err(BackendError::Exists(_))), "{again:?}");
    assert!(
        world.backend.endpoint(&third.sandbox_id).is_some(),
        "the refused one took the first one away"
    );
    world.close().await;
}

fn shell(line: &str) -> Exec {
    Exec {
        command: AgentCommand::Shell(line.to_owned()),
        env: Default::default(),
        working_dir: None,
        timeout_ms: Some(10_000),
        track: None,
    }
}
