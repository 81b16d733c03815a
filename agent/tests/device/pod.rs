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

/// The directory for podman's temporary files.
const TEMPORARY: &str = "temporary";
/// The file that exists if the service has been started since the boot.
const STARTED: &str = "started";

pub(crate) struct Pod {
    directory: tempfile::TempDir,
    service: Child,
    /// The state directory of the agent.
    state: PathBuf,
}

impl Pod {
    /// Starts a podman with this configuration of registries (containers-registries.conf(5)).
    pub(crate) fn start(registries: &str) -> Self {
        Self::start_at(&std::env::temp_dir(), registries)
    }

    /// Starts a podman whose files are in a new directory below `place`.
    pub(crate) fn start_at(place: &Path, registries: &str) -> Self {
        let directory = tempfile::tempdir_in(place).unwrap();
        write_configuration(directory.path(), registries);
        let state = directory.path().to_owned();
        let service = serve(directory.path(), &state);
        let pod = Self { directory, service, state };
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
        // A service that was started a moment ago has no socket yet.
        if self.socket().exists() {
            std::fs::remove_file(self.socket()).unwrap();
        }
    }

    /// Stops the service's process or continues it. A stopped process accepts requests but does not answer
    /// them.
    pub(crate) fn hang(&self, hangs: bool) {
        let signal = if hangs { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(&self.service), signal).unwrap();
    }

    /// Writes the file with the process id of the service, as `iot-podman.service` does.
    pub(crate) fn note_process(&self) {
        std::fs::write(self.socket().with_extension("pid"), format!("{}\n", self.service.id())).unwrap();
    }

    /// Waits until the service's process was ended, and starts it again.
    pub(crate) fn restart_when_ended(&mut self) {
        self.service.wait().unwrap();
        self.stop_service();
        self.start_service();
    }

    /// Returns the path of a file in podman's storage.
    pub(crate) fn in_storage(&self, path: &str) -> PathBuf {
        self.directory.path().join("root").join(path)
    }

    /// Lists podman's temporary files.
    pub(crate) fn temporary_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path().join(TEMPORARY)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Returns the number of processes that monitor a container of this podman.
    pub(crate) fn monitors(&self) -> usize {
        let storage = self.directory.path().to_str().unwrap().to_owned();
        let entries = std::fs::read_dir("/proc").unwrap().map_while(Result::ok);
        let is_monitor = |command: &Vec<u8>| {
            let command = String::from_utf8_lossy(command);
            command.split('\0').next().is_some_and(|program| program.ends_with("conmon"))
                && command.contains(&storage)
        };
        entries
            .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
            .filter(is_monitor)
            .count()
    }

    /// Returns the number of layers that no image and no container uses.
    pub(crate) fn unused_layers(&self) -> usize {
        let list = |path: &str| -> Vec<Value> {
            serde_json::from_slice(&std::fs::read(self.in_storage(path)).unwrap()).unwrap()
        };
        let layers = list("overlay-layers/layers.json");
        let users = [list("overlay-images/images.json"), list("overlay-containers/containers.json")].concat();
        let mut used: Vec<_> = users.iter().map(|user| user["layer"].as_str().unwrap().to_owned()).collect();
        let mut next = 0;
        while let Some(id) = used.get(next).cloned() {
            let layer = layers.iter().find(|layer| layer["id"] == id.as_str());
            used.extend(layer.and_then(|layer| layer["parent"].as_str()).map(str::to_owned));
            next += 1;
        }
        layers.iter().filter(|layer| !used.iter().any(|id| layer["id"] == id.as_str())).count()
    }

    /// Makes each start of a container fail with an error about the storage, or undoes that.
    pub(crate) fn break_storage(&self, is_broken: bool) {
        let script = "#!/bin/sh\necho mounting storage for container: torn >&2\nexit 1\n";
        let runtime = self.directory.path().join("runtime");
        std::fs::write(runtime, if is_broken { script } else { RUNTIME }).unwrap();
    }

    /// Stops the service, changes the storage, and starts the service as after a boot.
    pub(crate) fn damage(&mut self, state: &Path, change: impl FnOnce(&Path)) {
        self.stop_service();
        let overlay = self.in_storage("overlay");
        run(self.directory.path(), &["umount", "--all", "--force"]);
        // Without a boot, podman's own mount of this directory can stay.
        while Command::new("umount").arg(&overlay).stderr(Stdio::null()).status().unwrap().success() {}
        change(overlay.parent().unwrap());
        self.boot();
        self.state = state.to_owned();
        self.start_service();
    }

    /// Lets the next start of the service be the first one after a boot.
    pub(crate) fn boot(&self) {
        std::fs::remove_file(self.directory.path().join(STARTED)).unwrap();
    }

    pub(crate) fn start_service(&mut self) {
        self.service = serve(self.directory.path(), &self.state);
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

/// Builds an image in a storage of its own and pushes it to its registry. If `layers` is false, it has one layer.
pub(crate) fn push(directory: &Path, context: &Path, reference: &str, layers: bool) {
    write_configuration(directory, "");
    let layers = format!("--layers={layers}");
    run(directory, &["build", "--quiet", &layers, "--tag", reference, context.to_str().unwrap()]);
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
    // A podman that is killed leaves files here.
    command.env("TMPDIR", directory);
    command.env("CONTAINERS_CONF", directory.join("containers.conf"));
    command.env("CONTAINERS_REGISTRIES_CONF", directory.join("registries.conf"));
    let temporary = directory.join(TEMPORARY);
    std::fs::create_dir_all(&temporary).unwrap();
    command.env("TMPDIR", temporary);
    for (flag, place) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        command.arg(flag).arg(directory.join(place));
    }
    command
}

/// Writes a program that calls podman with the storage and the configuration of this directory.
fn program(directory: &Path) -> PathBuf {
    let command = podman(directory);
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().unwrap());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name.to_str()?, value?)));
    let variables: Vec<_> = variables.map(|(name, value)| format!("{name}={}", quoted(value))).collect();
    let arguments: Vec<_> = command.get_args().map(quoted).collect();
    let (variables, arguments) = (variables.join(" "), arguments.join(" "));
    let path = directory.join("podman");
    let text = format!("#!/bin/sh\nexport {variables}\nexec podman {arguments} \"$@\"\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn run(directory: &Path, arguments: &[&str]) -> String {
    let output =
        podman(directory).args(arguments).output().expect("start podman; cargo xtask ci --fix installs it");
    assert!(output.status.success(), "podman {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Starts podman's service as `dist/iot-podman.service` does.
fn serve(directory: &Path, state: &Path) -> Child {
    let mut prepare = Command::new(env!("CARGO_BIN_EXE_iot-agent"));
    prepare.arg("prepare-storage").arg("--state").arg(state).arg("--podman").arg(program(directory));
    for (flag, place) in [("--storage", "root"), ("--temporary", TEMPORARY), ("--started", STARTED)] {
        prepare.arg(flag).arg(directory.join(place));
    }
    assert!(prepare.status().unwrap().success());
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
