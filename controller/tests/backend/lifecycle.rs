//! Making, finding, adopting and taking away.

use std::time::Duration;

use crate::world::{World, can_run, process_of};
use controller::backend::{BackendError, LaunchSpec, LocalBackend, LocalConfig};
use sandgate_api::id::SandboxId;

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_runs_commands_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    let (_, metrics) = world.start(&spec).await;
    eprintln!("{metrics:?}");
    let outcome = world
        .sh(
            &spec,
            "echo $GREETING $HOME; id -u; python3 -c 'print(6*7)'; node -e 'console.log(7*6)'",
        )
        .await;
    assert_eq!(
        outcome.stdout, "hello /workspace\n1001\n42\n42\n",
        "{}",
        outcome.stderr
    );
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_made_sandboxes_are_found_and_taken_away() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    // Prepared, never launched.
    let prepared = world.spec();
    world.backend.prepare(&prepared).await.unwrap();
    // A launch that fails half-way: the runtime cannot use this name twice.
    let broken = world.spec();
    world.backend.prepare(&broken).await.unwrap();
    std::fs::create_dir_all(world.config.run_dir.join("runc").join(broken.sandbox_id.as_str())).unwrap();
    let launched = world.backend.launch(&broken).await;
    assert!(
        matches!(
            launched,
            Err(BackendError::Failed {
                step: "making the container",
                ..
            })
        ),
        "{launched:?}"
    );
    // No router: the failure takes away what was made before it.
    let router = world.config.run_dir.join("netns/router");
    let aside = world.config.run_dir.join("aside");
    std::fs::create_dir(&aside).unwrap();
    let lost = LocalBackend::open(LocalConfig {
        run_dir: aside,
        ..world.config.clone()
    })
    .await
    .unwrap();
    let refused = lost.prepare(&world.spec()).await;
    let Err(BackendError::Failed { message, .. }) = &refused else {
        panic!("{refused:?}")
    };
    assert!(message.contains("is netd running"), "{message}");
    assert!(lost.inventory().await.unwrap().iter().all(|found| !found.running));
    lost.remove_instance();
    assert!(router.exists());
    // Traces of a sandbox nobody has a record of.
    let stray = SandboxId::random();
    std::fs::create_dir_all(world.config.data_dir.join("sandboxes").join(stray.as_str())).unwrap();

    let mut expected = vec![prepared.sandbox_id, broken.sandbox_id, stray];
    expected.sort();
    let found: Vec<SandboxId> = world
        .backend
        .inventory()
        .await
        .unwrap()
        .into_iter()
        .map(|found| found.sandbox_id)
        .collect();
    assert_eq!(found, expected);
    for id in &expected {
        world.backend.destroy(id).await.unwrap();
        world.backend.destroy(id).await.unwrap();
    }
    assert_eq!(world.traces(), Vec::<String>::new());
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_adopts_what_runs_and_finds_what_died() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let (kept, dead) = (world.spec(), world.spec());
    let (endpoint, _) = world.start(&kept).await;
    world.start(&dead).await;
    // The second one's PID 1 is killed while nobody looks.
    let pid = process_of(&world, &dead);
    let exit = world.backend.wait_exit(&dead.sandbox_id);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    tokio::time::timeout(Duration::from_secs(60), exit)
        .await
        .expect("the end of PID 1 is noticed");

    let later = LocalBackend::open(world.config.clone()).await.unwrap();
    assert_eq!(later.endpoint(&kept.sandbox_id), Some(endpoint));
    for found in later.inventory().await.unwrap() {
        assert_eq!(found.running, found.sandbox_id == kept.sandbox_id, "{found:?}");
    }
    // The adopted one is watched, and its address is not given to anyone else.
    let waiting = later.wait_exit(&kept.sandbox_id);
    assert!(
        tokio::time::timeout(Duration::from_millis(200), waiting)
            .await
            .is_err()
    );
    let new = world.spec();
    assert_ne!(
        later.prepare(&new).await.unwrap().address,
        later.endpoint(&kept.sandbox_id).unwrap().address
    );
    assert_eq!(world.sh(&kept, "echo still here").await.stdout, "still here\n");
    let exit = later.wait_exit(&kept.sandbox_id);
    later.destroy(&kept.sandbox_id).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), exit)
        .await
        .expect("the end of PID 1 is noticed");
    for id in [&dead.sandbox_id, &new.sandbox_id] {
        later.destroy(id).await.unwrap();
    }
    assert_eq!(world.traces(), Vec::<String>::new());
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_at_once() {
    if !can_run() {
        return;
    }
    let world = std::sync::Arc::new(World::open().await);
    let mut launches = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let world = std::sync::Arc::clone(&world);
        launches.spawn(async move {
            let spec = world.spec();
            let begun = std::time::Instant::now();
            world.start(&spec).await;
            let took = begun.elapsed();
            let outcome = world
                .sh(&spec, "hostname; touch /workspace/here; ls /workspace")
                .await;
            assert_eq!(outcome.stdout, format!("{}\nhere\n", spec.sandbox_id));
            (spec, took)
        });
    }
    let mut all = launches.join_all().await;
    all.sort_by_key(|(_, took)| *took);
    eprintln!("20 at once: p50 {:?}, slowest {:?}", all[10].1, all[19].1);
    let ids: Vec<String> = ids_on_the_node(&world, all.iter().map(|(spec, _)| spec));
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 20, "{ids:?}");
    let mut ends = tokio::task::JoinSet::new();
    for (spec, _) in all {
        let world = std::sync::Arc::clone(&world);
        ends.spawn(async move { world.backend.destroy(&spec.sandbox_id).await.unwrap() });
    }
    ends.join_all().await;
    std::sync::Arc::into_inner(world).unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_after_another() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let mut times = Vec::new();
    for _ in 0..20 {
        let spec = world.spec();
        let begun = std::time::Instant::now();
        let (_, metrics) = world.start(&spec).await;
        times.push((begun.elapsed(), metrics));
        world.backend.destroy(&spec.sandbox_id).await.unwrap();
    }
    times.sort_by_key(|(total, _)| *total);
    eprintln!("create p50 {:?}, p95 {:?}", times[10], times[18].0);
    assert!(times[10].0 < Duration::from_secs(2), "{times:?}");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_is_told_so() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let cases = [
        (
            LocalConfig {
                image: "absent".into(),
                ..world.config.clone()
            },
            "make setup",
        ),
        (
            LocalConfig {
                runtime: "/bin/false".into(),
                ..world.config.clone()
            },
            "cannot run sandboxes",
        ),
        (
            LocalConfig {
                sandboxd: "/absent".into(),
                ..world.config.clone()
            },
            "make build",
        ),
        (
            LocalConfig {
                sandbox_cidr: "203.0.113.0/30".parse().unwrap(),
                ..world.config.clone()
            },
            "between /16 and /28",
        ),
        (
            LocalConfig {
                run_dir: "relative".into(),
                ..world.config.clone()
            },
            "not an absolute path",
        ),
    ];
    for (config, expected) in cases {
        let refused = LocalBackend::open(config).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    // An overlap with a route of this namespace: loopback's own is on every machine.
    let overlapping = LocalConfig {
        sandbox_cidr: "127.0.0.0/16".parse().unwrap(),
        ..world.config.clone()
    };
    let refused = LocalBackend::open(overlapping).await.unwrap_err().to_string();
    assert!(refused.contains("overlap the host's route"), "{refused}");
    for (field, spec) in [
        (
            "memory_bytes",
            LaunchSpec {
                memory_bytes: 1,
                ..world.spec()
            },
        ),
        (
            "cpu_millis",
            LaunchSpec {
                cpu_millis: 0,
                ..world.spec()
            },
        ),
        (
            "pids",
            LaunchSpec {
                pids: u64::MAX,
                ..world.spec()
            },
        ),
        (
            "disk_bytes",
            LaunchSpec {
                disk_bytes: 4096,
                ..world.spec()
            },
        ),
        (
            "agent_key",
            LaunchSpec {
                agent_key: "secret".into(),
                ..world.spec()
            },
        ),
        (
            "env",
            LaunchSpec {
                env: [("A=B".to_owned(), String::new())].into(),
                ..world.spec()
            },
        ),
    ] {
        let refused = world.backend.prepare(&spec).await;
        assert!(
            matches!(&refused, Err(BackendError::Invalid { field: named, .. }) if *named == field),
            "{refused:?}"
        );
    }
    world.close().await;
}

/// First user id on the node of each sandbox.
fn ids_on_the_node<'a>(world: &World, specs: impl Iterator<Item = &'a LaunchSpec>) -> Vec<String> {
    let map = |spec| std::fs::read_to_string(format!("/proc/{}/uid_map", process_of(world, spec))).unwrap();
    specs
        .map(|spec| map(spec).split_whitespace().nth(1).unwrap().to_owned())
        .collect()
}
