//! Tests of documents that follow a tag.

use std::sync::atomic::Ordering;

use agent_protocol::deployment::{ContainerSpec, Document, PullPolicy};
use agent_protocol::{DeploymentStatus, DeviceStatus, Phase};

use crate::device::{Device, document, spec};
use crate::fleet::wait_until;
use crate::images::{device, of_image};
use crate::registry::Registry;

fn following(reference: &str, probation: u32) -> Document {
    document(ContainerSpec {
        image: reference.to_owned(),
        pull: PullPolicy::Always,
        probation_seconds: Some(probation),
        ..spec(&[])
    })
}

/// Waits until the deployment has this phase with a container of an image that `is_right`.
async fn line(device: &Device, phase: Phase, is_right: impl Fn(&str) -> bool) -> DeploymentStatus {
    let right = |line: &DeploymentStatus| {
        line.phase == phase
            && line
                .container
                .as_ref()
                .is_some_and(|container| is_right(&container.image) && container.state == "running")
    };
    let status = device.fleet.status("the image", |status| status.deployment("web").is_some_and(right)).await;
    status.deployment("web").unwrap().clone()
}

fn image(line: &DeploymentStatus) -> String {
    line.container.as_ref().unwrap().image.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_follows_its_tag_even_without_the_registry() {
    let mut registry = Registry::start();
    let tag = registry.push("web:prod", 1 << 10);
    let mut device = device("follows", &registry, "tag_check_seconds = 1000").await;
    let first = device.fleet.put("web", &of_image(&tag)).await;
    let first = image(&device.fleet.line("web", first, Phase::Running).await);
    registry.push("web:prod", 1 << 10);
    // Without the policy, the device keeps the image, and the status shows that.
    let again = device.fleet.put("web", &of_image(&tag)).await;
    assert_eq!(image(&device.fleet.line("web", again, Phase::Running).await), first);
    let revision = device.fleet.put("web", &following(&tag, 0)).await;
    let second = image(&line(&device, Phase::Running, |image| image != first).await);
    device.fleet.line("web", revision, Phase::Running).await;
    let listed = || device.pod.podman(&["images", "--all", "--quiet", "--no-trunc"]);
    wait_until("the first image is deleted", || !listed().contains(&first)).await;
    // The document is put again.
    registry.push("web:prod", 1 << 10);
    device.fleet.put("web", &following(&tag, 0)).await;
    let third = image(&line(&device, Phase::Running, |image| image != second).await);
    wait_until("the second image is deleted", || !listed().contains(&second)).await;
    assert!(listed().contains(&third));
    // The registry is away when the device makes the container again.
    registry.stop();
    device.kill();
    let container = device.pod.running("web").remove(0);
    device.pod.podman(&["rm", "--force", "--time", "0", &container]);
    device.up();
    line(&device, Phase::Running, |image| image == third).await;
    let tells = |status: &DeviceStatus| {
        status
            .events
            .iter()
            .any(|event| event.what.contains("web: cannot ask for the tag of registry.test/web:prod"))
    };
    device.fleet.status("an event", tells).await;
}

/// The registry is asked at intervals.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_is_rolled_back_and_the_next_one_is_tried() {
    let registry = Registry::start();
    let tag = registry.push("web:prod", 1 << 10);
    let device = device("rolls", &registry, "tag_check_seconds = 1").await;
    device.fleet.put("web", &following(&tag, 5)).await;
    let good = image(&line(&device, Phase::Running, |_| true).await);
    registry.push_image("web:prod", &[1 << 10], "\"exit\", \"3\"");
    let back = line(&device, Phase::RolledBack, |image| image == good).await;
    assert!(back.last_error.as_ref().unwrap().contains("with exit code 3"), "{back:?}");
    // The bad image is not tried again, although the registry is asked again.
    let rolled_back = |status: &DeviceStatus| {
        let event = status.events.iter().find(|event| event.what.contains("the new image of revision"));
        event.map(|event| event.number)
    };
    let before = rolled_back(&device.fleet.status("an event", |status| rolled_back(status).is_some()).await);
    let asked = registry.line.connections.load(Ordering::SeqCst);
    wait_until("a question", || registry.line.connections.load(Ordering::SeqCst) > asked + 4).await;
    assert_eq!(rolled_back(&device.fleet.latest().await.unwrap().1), before);
    // The container is made again of the good image, although podman's tag names the bad one.
    let container = device.pod.running("web").remove(0);
    device.pod.podman(&["rm", "--force", "--time", "0", &container]);
    wait_until("another container", || device.pod.running("web").iter().any(|id| *id != container)).await;
    assert_eq!(image(&line(&device, Phase::RolledBack, |_| true).await), good);
    registry.push("web:prod", 1 << 10);
    let better = line(&device, Phase::Running, |image| image != good).await;
    assert_eq!(better.last_error, None);
}
