//! A podman for one test: its service, its storage, and an image archive.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) const IMAGE: &str = "localhost/iot-agent-test:1";

/// The program in the image. It prints its arguments and waits, or exits as the arguments say.
const PROGRAM: &str = r#"
extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    fn _exit(code: i32) -> !;
}
extern "C" fn end(_: i32) {
    unsafe { _exit(0) }
}
fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    // The kernel ignores signals to the first process of a container that have no handler.
    if words.first().is_none_or(|word| word != "stay") {
        unsafe { signal(15, end) };
    }
    println!("words {words:?} generation {}", std::env::var("GENERATION").unwrap_or_default());
    if words.first().is_some_and(|word| word == "exit") {
        std::process::exit(words[1].parse().unwrap());
    }
    if words.first().is_some_and(|word| word == "write") {
        std::fs::write("/data/written", "by the first").unwrap();
    }
    if words.first().is_some_and(|word| word == "read") {
        println!("read {:?}", std::fs::read_to_string("/data/written"));
    }
    loop { std::thread::park() }
}
"#;

pub(crate) struct Pod {
    directory: tempfile::TempDir,
    service: Child,
}

impl Pod {
    /// Starts a podman with this configuration of registries (containers-registries.conf(5)).
    pub(crate) fn start(registries: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        write_configuration(directory.path(), registries);
        let service = serve(directory.path());
        let pod = Self { directory, service };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !pod.socket().exists() {
            assert!(Instant::now() < deadline, "podman's service does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        pod
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("podman.sock")
    }

    /// Runs podman(1), which must succeed, and returns its stdout.
    pub(crate) fn podman(&self, arguments: &[&str]) -> String {
        run(self.directory.path(), arguments)
    }

    /// Changes a container without the agent. podman(1) ends a container, releases its lock, and cleans up.
    /// If the agent has restarted the container before the clean-up, podman 4.3 reports an error, which is
    /// not a failure of the test.
    pub(crate) fn meddle(&self, arguments: &[&str]) {
        let output = podman(self.directory.path()).args(arguments).output().expect("start podman");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let restarted = stderr.contains("is running or paused, refusing to clean up");
        assert!(output.status.success() || restarted, "podman {arguments:?}: {stderr}");
    }

    /// Lists all containers, including ended ones, as podman does.
    pub(crate) fn containers(&self) -> Vec<Value> {
        let listed = self.podman(&["ps", "--all", "--format", "json"]);
        serde_json::from_str::<Option<Vec<Value>>>(&listed).unwrap().unwrap_or_default()
    }

    /// Returns the ids of a deployment's running containers.
    pub(crate) fn running(&self, deployment: &str) -> Vec<String> {
        let own = |container: &&Value| {
            container["Labels"]["io.iot-agent.deployment"] == deployment && container["State"] == "running"
        };
        let id = |container: &Value| container["Id"].as_str().unwrap().to_owned();
        self.containers().iter().filter(own).map(id).collect()
    }

    pub(crate) fn stop_service(&mut self) {
        self.service.kill().unwrap();
        self.service.wait().unwrap();
        std::fs::remove_file(self.socket()).unwrap();
    }

    /// Stops the service's process or continues it. A stopped process accepts requests but does not answer
    /// them.
    pub(crate) fn hang(&self, hangs: bool) {
        let signal = if hangs { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(&self.service), signal).unwrap();
    }

    pub(crate) fn start_service(&mut self) {
        self.service = serve(self.directory.path());
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        run(self.directory.path(), &["rm", "--force", "--all", "--time", "0"]);
        self.service.kill().unwrap();
        self.service.wait().unwrap();
        // The directory cannot be deleted while overlays are mounted in it.
        run(self.directory.path(), &["umount", "--all", "--force"]);
    }
}

/// Returns a directory with the image's archive, which podman creates once.
pub(crate) fn archives() -> &'static Path {
    static ARCHIVES: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVES.get_or_init(|| {
        let directory =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("archives-{}", std::process::id()));
        let context = directory.join("context");
        std::fs::create_dir_all(&context).unwrap();
        std::fs::write(directory.join("program.rs"), PROGRAM).unwrap();
        let arguments = "-O -C target-feature=+crt-static -C strip=symbols program.rs -o context/program";
        let built = Command::new("rustc").args(arguments.split(' ')).current_dir(&directory).status();
        assert!(built.unwrap().success());
        std::fs::write(
            context.join("Containerfile"),
            "FROM scratch\nCOPY program /program\nENTRYPOINT [\"/program\"]\n",
        )
        .unwrap();
        let storage = tempfile::tempdir().unwrap();
        write_configuration(storage.path(), "");
        run(storage.path(), &["build", "--quiet", "--tag", IMAGE, context.to_str().unwrap()]);
        let archive = directory.join("localhost_iot-agent-test_1.tar");
        run(
            storage.path(),
            &["save", "--quiet", "--format", "oci-archive", "--output", archive.to_str().unwrap(), IMAGE],
        );
        directory
    })
}

/// Builds an image in a storage of its own and pushes it to its registry.
pub(crate) fn push(directory: &Path, context: &Path, reference: &str) {
    write_configuration(directory, "");
    run(directory, &["build", "--quiet", "--layers=false", "--tag", reference, context.to_str().unwrap()]);
    run(directory, &["push", "--quiet", "--tls-verify=false", reference]);
    run(directory, &["rmi", "--force", reference]);
}

/// A wrapper of runc that removes the resource limits from the container's configuration. podman's service
/// (4.3) requests the highest possible limits, whatever containers.conf says. If this test runs in a
/// container, not even root can raise limits.
const RUNTIME: &str = r#"#!/bin/sh
bundle=
for word; do
    [ "$bundle" != next ] || bundle=$word
    [ "$word" != --bundle ] || bundle=next
done
[ -z "$bundle" ] || sed -i 's/"rlimits":\[[^]]*\],//' "$bundle/config.json"
exec runc "$@"
"#;

/// Writes podman's configuration. Debian 12's crun refuses the hybrid cgroups of some containers, but runc
/// accepts them. Locks are in files, since locks in shared memory belong to the user and not to the storage.
fn write_configuration(directory: &Path, registries: &str) {
    std::fs::write(directory.join("registries.conf"), registries).unwrap();
    let runtime = directory.join("runtime");
    std::fs::write(&runtime, RUNTIME).unwrap();
    std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o755)).unwrap();
    let text = format!(
        "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nlock_type = \"file\"\n\
         [engine.runtimes]\nrunc = [\"{}\"]\n[containers]\nnetns = \"none\"\n",
        runtime.display()
    );
    std::fs::write(directory.join("containers.conf"), text).unwrap();
}

fn podman(directory: &Path) -> Command {
    let mut command = Command::new("podman");
    command.env("CONTAINERS_CONF", directory.join("containers.conf"));
    command.env("CONTAINERS_REGISTRIES_CONF", directory.join("registries.conf"));
    for (flag, place) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        command.arg(flag).arg(directory.join(place));
    }
    command
}

fn run(directory: &Path, arguments: &[&str]) -> String {
    let output =
        podman(directory).args(arguments).output().expect("start podman; cargo xtask ci --fix installs it");
    assert!(output.status.success(), "podman {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn serve(directory: &Path) -> Child {
    let log = std::fs::File::create(directory.join("service.log")).unwrap();
    podman(directory)
        .args(["system", "service", "--time", "0"])
        .arg(format!("unix://{}", directory.join("podman.sock").display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}
