//! Tests of obstacles on the device: ports, volumes and containers that others have left or that are in use.

use std::net::TcpListener;
use std::path::Path;

use agent_protocol::Phase;
use agent_protocol::deployment::{ContainerSpec, Port, Protocol, Volume};

use crate::device::{Device, document, spec};
use crate::fleet::wait_until;
use crate::pod::{self, IMAGE};

/// podman(1) requests the highest possible limits without these options.
const LIMITS: [&str; 4] = ["--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_named_with_a_way_out() {
    let mut device = Device::start("blocked").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    pod.podman(&["load", "--quiet", "--input", archive().as_str()]);
    let revision = fleet.put("web", &document(spec(&[]))).await;
    fleet.line("web", revision, Phase::Running).await;
    let before = pod.running("web");

    // A port that another program holds is found before the running container is stopped.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let number = listener.local_addr().unwrap().port();
    let port = Port { host: number, container: 80, address: None, protocol: Protocol::Tcp };
    let changed = fleet.put("web", &document(ContainerSpec { ports: vec![port], ..spec(&[]) })).await;
    let line = fleet.line("web", changed, Phase::BackingOff).await;
    let error = line.last_error.unwrap();
    assert!(error.contains(&format!("port {number} of the device is in use")), "{error}");
    assert_eq!((line.running_revision, pod.running("web")), (Some(revision), before.clone()));

    // A volume of the right name that is not the agent's is not used. The commands in the error make it usable.
    pod.podman(&["volume", "create", "iot-blocked.web.data"]);
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    let changed =
        fleet.put("web", &document(ContainerSpec { volumes: vec![data], ..spec(&["write"]) })).await;
    let line = fleet.line("web", changed, Phase::BackingOff).await;
    let error = line.last_error.unwrap();
    assert!(error.contains("the volume iot-blocked.web.data lacks the agent's labels"), "{error}");
    assert_eq!(pod.running("web"), before);
    let labels: Vec<_> =
        error.split("--label ").skip(1).map(|rest| rest.split([' ', ',']).next().unwrap()).collect();
    let tar = device.home.path().join("data.tar");
    let tar = tar.to_str().unwrap();
    // The agent would make a new volume between the commands.
    device.agent.take().unwrap().stop();
    let pod = &device.pod;
    pod.podman(&["volume", "export", "--output", tar, "iot-blocked.web.data"]);
    pod.podman(&["volume", "rm", "iot-blocked.web.data"]);
    pod.podman(&["volume", "create", "--label", labels[0], "--label", labels[1], "iot-blocked.web.data"]);
    pod.podman(&["volume", "import", "iot-blocked.web.data", tar]);
    device.up();
    let pod = &device.pod;
    device.fleet.line("web", changed, Phase::Running).await;
    assert_ne!(pod.running("web"), before);

    // A container of an earlier device id is left alone and named.
    let device_label = ["--label", "io.iot-agent.device=former", "--label", "io.iot-agent.deployment=web"];
    let run =
        [&["run", "--detach", "--name", "iot-former.web"][..], &LIMITS, &device_label, &[IMAGE]].concat();
    let former = pod.podman(&run).trim().to_owned();
    device.agent.take().unwrap().stop();
    device.up();
    let told = |status: &agent_protocol::DeviceStatus| {
        status
            .events
            .iter()
            .any(|event| event.what == "leaving 1 container of others alone: iot-former.web (device former)")
    };
    device.fleet.status("the container of the earlier id", told).await;

    // A second agent, such as one that was started by hand, does not use the same state.
    let config = device.home.path().join("config.toml");
    let second = std::process::Command::new("timeout")
        .args(["20", env!("CARGO_BIN_EXE_iot-agent"), "run", "--config"])
        .arg(config)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && error.contains("does another agent run?"), "{error}");
    assert!(device.pod.running("web").contains(&former));
}

/// After a power cut, the layer of a container that was made just before may be missing. Podman can then neither start
/// nor inspect the container.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_container_is_made_again() {
    let mut device = Device::start("torn-layer").await;
    let revision = device.fleet.put("web", &document(spec(&[]))).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.kill();
    let pod = &device.pod;
    let before = pod.running("web");
    let upper = pod.podman(&["inspect", "--format", "{{.GraphDriver.Data.UpperDir}}", &before[0]]);
    pod.podman(&["stop", "--time", "0", &before[0]]);
    std::fs::remove_dir_all(Path::new(upper.trim()).parent().unwrap()).unwrap();
    device.up();
    wait_until("another container", || device.pod.running("web").len() == 1).await;
    assert_ne!(device.pod.running("web"), before);
    assert_eq!(device.pod.containers().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_volumes_are_kept_while_the_image_stays() {
    let device = Device::start("anonymous").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    pod.podman(&["load", "--quiet", "--input", archive().as_str()]);
    let image = "localhost/with-volume:1";
    let file = device.home.path().join("Containerfile");
    std::fs::write(&file, format!("FROM {IMAGE}\nVOLUME /data\n")).unwrap();
    pod.podman(&["build", "--quiet", "--tag", image, "--file", file.to_str().unwrap(), "."]);
    let with = |words| document(ContainerSpec { image: image.into(), ..spec(words) });
    let first = fleet.put("web", &with(&["write"])).await;
    fleet.line("web", first, Phase::Running).await;
    let volumes = || pod.podman(&["volume", "ls", "--quiet"]);
    let before = volumes();
    let second = fleet.put("web", &with(&["read"])).await;
    fleet.line("web", second, Phase::Running).await;
    wait_until("the previous container is removed", || pod.containers().len() == 1).await;
    assert_eq!(volumes(), before);
    assert!(pod.podman(&["logs", &pod.running("web")[0]]).contains("by the first"), "its data stayed");
    fleet.delete("web").await;
    fleet.gone("web", second + 1).await;
    assert_eq!(volumes().trim(), "", "the volume goes with the last container");
}

fn archive() -> String {
    pod::archives().join("localhost_iot-agent-test_1.tar").to_str().unwrap().to_owned()
}
