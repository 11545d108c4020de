//! What runs: frozen, thawed, measured.

use std::time::Duration;

use crate::world::{MIB, World, can_run};
use controller::backend::{LaunchSpec, LocalBackend, Reading};

/// A process that uses a processor for as long as it may, and notes how far it is.
const BUSY: &str = "setsid python3 -c 'import os\nn = 0\nwhile True:\n n += 1\n if n % 20000 == 0:\n  \
    with open(\"/tmp/at.new\", \"w\") as f: f.write(str(n))\n  os.rename(\"/tmp/at.new\", \"/tmp/at\")' \
    >/dev/null 2>&1 </dev/null & while ! test -e /tmp/at; do sleep 0.05; done";

async fn reading(world: &World, spec: &LaunchSpec) -> Reading {
    world.backend.reading(&spec.sandbox_id).await.expect("a reading")
}

/// How far the busy process is, as the node sees it: nothing in the sandbox need run for that.
fn progress(world: &World, spec: &LaunchSpec) -> u64 {
    let file = world
        .config
        .run_dir
        .join("mnt")
        .join(spec.sandbox_id.as_str())
        .join("tmp/at");
    std::fs::read_to_string(file).unwrap().parse().unwrap()
}

async fn moves_on(world: &World, spec: &LaunchSpec) {
    let before = progress(world, spec);
    while progress(world, spec) == before {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_frozen_uses_no_processor_and_goes_on_where_it_was() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let (busy, other) = (world.spec(), world.spec());
    world.start(&busy).await;
    world.start(&other).await;
    world.sh(&busy, BUSY).await;
    moves_on(&world, &busy).await;

    world.backend.freeze(&busy.sandbox_id).await.unwrap();
    let (at, used) = (progress(&world, &busy), reading(&world, &busy).await.cpu);
    // Work of another sandbox passes meanwhile, and nothing of this one's.
    world.sh(&other, "python3 -c 'print(sum(range(2000000)))'").await;
    assert_eq!(progress(&world, &busy), at);
    assert_eq!(reading(&world, &busy).await.cpu, used);
    // Doing it again changes nothing, and the next controller finds it so.
    world.backend.freeze(&busy.sandbox_id).await.unwrap();
    let next = LocalBackend::open(world.config.clone()).await.unwrap();
    next.freeze(&busy.sandbox_id).await.unwrap();
    assert_eq!(progress(&world, &busy), at);
    next.thaw(&busy.sandbox_id).await.unwrap();
    moves_on(&world, &busy).await;
    world.agent(&busy).await.ping().await.unwrap();
    assert_eq!(world.sh(&busy, "echo alive").await.stdout, "alive\n");

    // A frozen one can be taken away.
    world.backend.freeze(&busy.sandbox_id).await.unwrap();
    world.backend.destroy(&busy.sandbox_id).await.unwrap();
    assert_eq!(world.sh(&other, "echo alive").await.stdout, "alive\n");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_sandbox_uses_is_counted_as_its_own() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let (spec, idle) = (world.spec(), world.spec());
    world.start(&spec).await;
    world.start(&idle).await;
    let (before, before_idle) = (reading(&world, &spec).await, reading(&world, &idle).await);
    assert!(before.memory_bytes > 0 && before.processes > 0, "{before:?}");
    assert!(
        before.disk_limit > 32 * MIB && before.disk_limit <= 64 * MIB,
        "{before:?}"
    );
    let spent: f64 = world
        .sh(
            &spec,
            "head -c 8M /dev/zero > /workspace/x; sync; head -c 2M /dev/zero | base64; exec python3 -c 'import os, sys\n\
             while sum(os.times()[:2]) < 0.5: pass\nprint(sum(os.times()[:2]), file=sys.stderr)'",
        )
        .await
        .stderr
        .trim()
        .parse()
        .unwrap();
    let after = reading(&world, &spec).await;
    let cpu = (after.cpu - before.cpu).as_secs_f64();
    assert!(
        cpu > spent * 0.9 && cpu < spent + 20.0,
        "{cpu} s counted, {spent} s spent"
    );
    assert!(after.disk_bytes >= before.disk_bytes + 8 * MIB, "{after:?}");
    // Base64 of two mebibytes came out as a command's output.
    let sent = after.sent_bytes - before.sent_bytes;
    assert!((2 * MIB..32 * MIB).contains(&sent), "{sent}");
    assert!(after.received_bytes > before.received_bytes);
    assert!(!after.is_idle_since(before, Duration::from_secs(1)));
    // The neighbour has done nothing, and all of it is seen at once.
    let ids = vec![spec.sandbox_id.clone(), idle.sandbox_id.clone()];
    let both = world.backend.readings(ids).await.unwrap();
    assert!(both[&idle.sandbox_id].is_idle_since(before_idle, Duration::from_secs(60)));
    assert!(both[&spec.sandbox_id].sent_bytes >= after.sent_bytes);
    world.backend.destroy(&spec.sandbox_id).await.unwrap();
    assert_eq!(world.backend.reading(&spec.sandbox_id).await, None);
    world.close().await;
}
