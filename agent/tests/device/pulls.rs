//! Tests of pulls that a fault interrupts. The image is complete in the end.

use std::sync::atomic::Ordering;
use std::time::Duration;

use agent_protocol::Phase;

use crate::device::Device;
use crate::fleet::wait_until;
use crate::images::{device, of_image};
use crate::registry::Registry;

/// Checks that the container of `web` has these layers of the image that was pushed last.
fn check_content(device: &Device, registry: &Registry, layers: usize) {
    let copy = tempfile::tempdir().unwrap();
    for index in 0..layers {
        let to = copy.path().join(index.to_string());
        let from = format!("{}:/random{index}", device.pod.running("web")[0]);
        device.pod.podman(&["cp", &from, to.to_str().unwrap()]);
        assert!(std::fs::read(to).unwrap() == registry.layer(index), "layer {index} is wrong");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_cut_in_a_layer_is_repeated() {
    let registry = Registry::start();
    let image = registry.push("cut:1", 3 << 20);
    let device = device("cut", &registry, "").await;
    registry.line.allowed.store(2 << 20, Ordering::SeqCst);
    registry.line.cuts.store(true, Ordering::SeqCst);
    let revision = device.fleet.put("web", &of_image(&image)).await;
    device.fleet.error("web", "pull the image registry.test/cut:1").await;
    registry.line.allowed.store(u64::MAX, Ordering::SeqCst);
    device.fleet.line("web", revision, Phase::Running).await;
    check_content(&device, &registry, 1);
}

/// Two of the layers are complete when the agent and podman are killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_survives_the_death_of_the_agent_and_of_podman() {
    let registry = Registry::start();
    let image = registry.push_image("killed:1", &[100 << 10, 400 << 10, 4 << 20], "");
    let mut device = device("killed", &registry, "").await;
    registry.line.allowed.store(3 << 20, Ordering::SeqCst);
    let revision = device.fleet.put("web", &of_image(&image)).await;
    wait_until("the line is stuck", || registry.line.allowed.load(Ordering::SeqCst) < 16 << 10).await;
    device.kill();
    device.pod.stop_service();
    registry.line.allowed.store(u64::MAX, Ordering::SeqCst);
    device.pod.start_service();
    device.up();
    device.fleet.line("web", revision, Phase::Running).await;
    check_content(&device, &registry, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_too_many_requests_is_left_alone() {
    let registry = Registry::start();
    let image = registry.push("limit:1", 1 << 10);
    let device = device("limit", &registry, "").await;
    registry.line.refuses.store(true, Ordering::SeqCst);
    device.fleet.put("web", &of_image(&image)).await;
    device.fleet.error("web", "too many requests").await;
    let asked = registry.line.connections.load(Ordering::SeqCst);
    // The reconciler tries after 1 s.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(registry.line.connections.load(Ordering::SeqCst), asked);
}
