//! Tests preflight on broken hosts. `xtask` runs in its own mount namespace, in which one thing is missing or wrong.
//! It must report that fault under the right id, and no other finding that the sound machine does not have. Each case
//! takes a fraction of a second. `cargo xtask ci` runs these tests after a preflight, because the machine itself must
//! be sound.

mod fix;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use rustix::process::geteuid;
use xtask_core::cache::Cache;
use xtask_core::runs::RunDir;

use crate::draw::drawn;
use crate::scratch::{XTASK, assert_code, command, message};

/// A broken host: this machine after `script`, with `environment`.
struct Host {
    scratch: tempfile::TempDir,
    script: String,
    environment: Vec<(&'static str, String)>,
    arguments: Vec<&'static str>,
    program: String,
    /// The capabilities that root does not have.
    lost: &'static [&'static str],
}

/// The capabilities that override permissions. Without them, root cannot read private files of other users.
const OVERRIDES: &[&str] = &["dac_override", "dac_read_search"];

/// The output of preflight.
#[derive(Debug)]
struct PreflightOutput {
    code: Option<i32>,
    ids: BTreeSet<String>,
    blocking: BTreeSet<String>,
    json: serde_json::Value,
}

impl Host {
    /// Makes a host with its own cache, for guests of aarch64.
    fn new() -> Self {
        let scratch = tempfile::tempdir_in("/tmp").unwrap();
        // Users other than root must be able to enter the directory.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(scratch.path(), open).unwrap();
        let cache = scratch.path().join("c");
        xtask_core::fs::make_private_dir(&cache).unwrap();
        Self {
            environment: vec![("IOT_XTASK_CACHE", cache.display().to_string())],
            scratch,
            script: String::new(),
            arguments: vec!["--arch", "aarch64"],
            program: XTASK.to_owned(),
            lost: &[],
        }
    }

    /// Adds shell commands that break the host. `$S` is a directory for their files.
    fn after(mut self, script: &str) -> Self {
        self.script.push_str(script);
        self.script.push('\n');
        self
    }

    /// Adds shell commands that run before those that break the host.
    fn prepared(mut self, script: &str) -> Self {
        self.script.insert_str(0, &format!("{script}\n"));
        self
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    fn asked(mut self, arguments: &[&'static str]) -> Self {
        self.arguments = arguments.to_vec();
        self
    }

    fn without(mut self, capabilities: &'static [&'static str]) -> Self {
        self.lost = capabilities;
        self
    }

    fn file(&self, name: &str) -> String {
        self.scratch.path().join(name).display().to_string()
    }

    /// Writes an executable script and returns its path.
    fn program(&self, name: &str, text: &str) -> String {
        let path = self.file(name);
        std::fs::write(&path, text).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, executable).unwrap();
        path
    }

    fn command(&self) -> Command {
        let lost: Vec<_> = self.lost.iter().map(|capability| format!("-{capability}")).collect();
        let run = match lost.join(",").as_str() {
            "" => "exec \"$@\"".to_owned(),
            lost => format!("exec setpriv --inh-caps={lost} --bounding-set={lost} \"$@\""),
        };
        let script = format!("set -eu\n{}\n{run}", self.script);
        let mut command = command("unshare", &["--mount"]);
        if !geteuid().is_root() {
            command.arg("--map-root-user");
        }
        command.args(["sh", "-c", &script, "sh", &self.program, "preflight", "--json"]).args(&self.arguments);
        command
            .env("S", self.scratch.path())
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    fn preflight(&self) -> PreflightOutput {
        let output = self.command().output().unwrap();
        let json: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", message(&output)));
        let findings = json["findings"].as_array().unwrap();
        let id = |finding: &serde_json::Value| finding["id"].as_str().unwrap().to_owned();
        let blocks = |finding: &&serde_json::Value| finding["severity"] == "blocks";
        PreflightOutput {
            code: output.status.code(),
            ids: findings.iter().map(id).collect(),
            blocking: findings.iter().filter(blocks).map(id).collect(),
            json,
        }
    }

    /// Checks that preflight reports `id`, and no other finding that the sound machine does not have. If the finding
    /// blocks, the exit code must be 69.
    fn assert_finds(&self, id: &str, blocks: bool) {
        let (sound, broken) = (Self::new().asked(&self.arguments).preflight(), self.preflight());
        assert!(!sound.ids.contains(id), "the sound machine has {id} too: {:#}", sound.json);
        let new: Vec<_> = broken.ids.difference(&sound.ids).collect();
        assert_eq!(new, [id], "{:#}", broken.json);
        assert_eq!(broken.blocking.contains(id), blocks, "{:#}", broken.json);
        assert_eq!(broken.code, Some(if blocks { 69 } else { 0 }), "{:#}", broken.json);
        let findings = broken.json["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["id"] == id).unwrap();
        assert!(!finding["evidence"].as_str().unwrap().is_empty(), "{finding}");
        assert!(!blocks || !finding["remedy"].is_null(), "{finding}");
    }
}

/// A broken host, the id of its finding, and whether the finding blocks.
type Case = (Host, &'static str, bool);

/// Checks each host of the table that the draw selects.
fn assert_each_finds(table: &str, cases: Vec<Case>) {
    for (host, id, blocks) in drawn(table, cases, |(_, id, _)| (*id).to_owned()) {
        host.assert_finds(id, blocks);
    }
}

/// Returns shell commands that hide programs by putting `/dev/null` in their place.
fn hide(pattern: &str) -> String {
    format!("for program in {pattern}; do [ ! -f \"$program\" ] || mount --bind /dev/null \"$program\"; done")
}

/// Shell commands that replace the system's firmware directory by an empty one, `$S/own`. `$S/system` still has the
/// files.
const OWN_FIRMWARE: &str = "mkdir $S/system $S/own; mount --bind /usr/share/AAVMF $S/system; mount --bind $S/own /usr/share/AAVMF
mkdir $S/described; cp /usr/share/qemu/firmware/* $S/described; mount --bind $S/described /usr/share/qemu/firmware";

#[test]
fn a_sound_machine_is_ready() {
    let sound = Host::new().preflight();
    assert_eq!(sound.code, Some(0), "{:#}", sound.json);
    assert_eq!(sound.blocking, BTreeSet::new());
    assert_eq!(sound.json["ready"], true);
}

#[test]
fn firmware() {
    let host = || Host::new().after(OWN_FIRMWARE);
    let small = "cp $S/system/AAVMF_VARS.fd $S/own; for name in AAVMF_CODE.fd AAVMF_CODE.no-secboot.fd; do truncate -s 2M $S/own/$name; done";
    let enrolled = "rm $S/described/[56]*; cp $S/system/AAVMF_CODE.ms.fd $S/system/AAVMF_VARS.ms.fd $S/own";
    let bad = "cp $S/system/* $S/own; cd $S/own; sed -i 's/edk2-20[0-9][0-9]\\.[0-9][0-9]/edk2-2025.11/g' AAVMF_CODE*.fd";
    let cases = vec![
        (host(), "firmware-descriptor", true),
        (host().after(small), "firmware-size", true),
        (host().after(enrolled), "firmware-enrolled", true),
        (host().after("rm $S/described/*"), "firmware", true),
        (host().after(bad), "firmware-known-bad", false),
    ];
    assert_each_finds("firmware", cases);
}

/// Makes a host whose emulator for aarch64 is this script.
fn emulated_by(script: &str) -> Host {
    let host = Host::new();
    let emulator = host.program("q", script);
    host.after(&format!("mount --bind {emulator} \"$(readlink -f /usr/bin/qemu-system-aarch64)\""))
}

#[test]
fn emulator() {
    // This emulator is asked for a network type that no QEMU has.
    let without_network = emulated_by("#!/bin/sh\nsed 's/\"user\"/\"absent\"/' | exec $S/real \"$@\"\n")
        .prepared("cp \"$(readlink -f /usr/bin/qemu-system-aarch64)\" $S/real");
    let cases = vec![
        (Host::new().after(&hide("/usr/bin/qemu-system-*")), "emulator", true),
        (Host::new().after(&hide("/usr/bin/qemu-system-aarch64")), "emulator-arch", true),
        (emulated_by("#!/bin/sh\necho 'cannot allocate memory' >&2\nexit 1\n"), "emulator-broken", true),
        (emulated_by("#!/bin/sh\nexec sleep 600\n"), "emulator-broken", true),
        (without_network, "emulator-network", true),
    ];
    assert_each_finds("emulator", cases);
}

#[test]
fn programs_and_libraries() {
    let drivers = "for d in /usr/lib*/*/libvirt/connection-driver /usr/lib*/libvirt/connection-driver; do
        [ ! -d $d ] || mount -t tmpfs tmpfs $d; done";
    let iohelpers = "/usr/lib*/libvirt/libvirt_iohelper /usr/libexec/libvirt_iohelper";
    let host = Host::new();
    let old = host.program("nats-server", "#!/bin/sh\necho 'nats-server: v2.8.4'\n");
    let path = format!("{}:{}", Path::new(&old).parent().unwrap().display(), std::env::var("PATH").unwrap());
    let cases = vec![
        (Host::new().after(&hide("/usr/bin/mcopy /usr/bin/mtools")), "program", true),
        (Host::new().after(&hide("/usr/bin/pkg-config /usr/bin/pkgconf")), "pkg-config", true),
        (Host::new().with("PKG_CONFIG_LIBDIR", "/nonexistent"), "pkg-config-astray", true),
        (Host::new().after(drivers), "libvirt-driver", true),
        (Host::new().after(&hide(iohelpers)), "libvirt-iohelper", true),
        (host.with("PATH", path), "nats-server-old", true),
        (Host::new().after("mount --bind /bin/false /usr/bin/getent"), "libvirt-user-unknown", false),
    ];
    assert_each_finds("programs and libraries", cases);
}

#[test]
fn linker_and_target() {
    const LINKER: &str = "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER";
    let libraries = "/usr/aarch64-linux-gnu/lib";
    let all_but_one = format!(
        "mkdir $S/lib; mount --bind {libraries} $S/lib; mount -t tmpfs tmpfs {libraries}
        for file in $S/lib/*; do [ \"${{file##*/}}\" = libc.a ] || ln -s \"$file\" {libraries}/; done"
    );
    let libdir = "$(rustc --print target-libdir --target aarch64-unknown-linux-gnu)";
    let hidden = |directory: &str| Host::new().after(&format!("mount -t tmpfs tmpfs {directory}"));
    // Make a copy of the cross-compiler's C library with a later version in its banner. The compiler finds the copy
    // first.
    let later = Host::new();
    let linker = later.program("ld", "#!/bin/sh\nexec aarch64-linux-gnu-gcc -B\"$S/\" \"$@\"\n");
    let script = "sed 's/release version 2\\.[0-9]*/release version 2.99/' $(aarch64-linux-gnu-gcc -print-file-name=libc.so.6) > $S/libc.so.6";
    let cases = vec![
        (Host::new().with(LINKER, "/nonexistent/ld"), "linker", true),
        (Host::new().with(LINKER, "x86_64-linux-gnu-gcc"), "linker-foreign", true),
        (Host::new().with("RUSTFLAGS", "-C linker=/nonexistent/ld"), "linker", true),
        (Host::new().with("CC", "aarch64-linux-gnu-gcc"), "c-compiler", true),
        (Host::new().with("CFLAGS", "-march=armv8-a"), "c-compiler", true),
        (hidden(libraries), "linker", true),
        (Host::new().after(&all_but_one), "static-libc", true),
        (hidden(libdir), "rust-target", true),
        (later.after(script).with(LINKER, linker), "libc-newer", false),
    ];
    assert_each_finds("linker and target", cases);
}

/// In an unprivileged container, root does not have CAP_SYS_ADMIN.
#[test]
fn a_root_that_may_not_mount() {
    let host = |arguments: &[&'static str]| Host::new().without(&["sys_admin"]).asked(arguments);
    let built = ["--arch", "aarch64", "--image", "debian-12"];
    let cases = vec![(host(&built), "mount", true), (host(&built[..2]), "mount", false)];
    assert_each_finds("mounts", cases);
}

/// Makes a host with its own `/dev` and with a processor that has `flags`. The command `make` may create `$S/dev/kvm`,
/// which becomes `/dev/kvm`.
fn kvm(make: &str, flags: &str) -> Host {
    let script = format!(
        "mkdir $S/dev; mount -t tmpfs -o mode=755 tmpfs $S/dev
        for name in null zero urandom random tty; do mknod -m 666 $S/dev/$name c $(stat -c '0x%t 0x%T' /dev/$name); done
        {make}
        printf 'processor: 0\\nflags\\t\\t: {flags}\\n' > $S/cpuinfo; mount --bind $S/cpuinfo /proc/cpuinfo
        mount --move $S/dev /dev"
    );
    Host::new().after(&script).asked(&["--arch", host_arch(), "--strict-image"])
}

fn host_arch() -> &'static str {
    std::env::consts::ARCH
}

#[test]
fn kvm_absent_denied_and_lying() {
    assert_eq!(host_arch(), "x86_64", "preflight reads the processor's flags on x86 only");
    // This copy of /dev/null opens like a real /dev/kvm. Preflight learns from the processor's flags whether KVM can
    // run a kernel.
    let opens = "mknod -m 666 $S/dev/kvm c 1 3";
    let ids =
        |host: Host| host.preflight().ids.into_iter().filter(|id| id.starts_with("kvm")).collect::<Vec<_>>();
    assert_eq!(ids(kvm("", "fpu vmx")), ["kvm-absent"]);
    assert_eq!(ids(kvm(opens, "fpu hypervisor")), ["kvm-software"]);
    assert_eq!(ids(kvm(opens, "fpu vmx hypervisor")), ["kvm-nested"]);
    assert_eq!(ids(kvm(opens, "fpu svm")), [] as [&str; 0]);
    let unprivileged = |make: &str| kvm(make, "fpu vmx").without(OVERRIDES);
    assert_eq!(ids(unprivileged("mknod -m 600 $S/dev/kvm c 1 3; chown 65534 $S/dev/kvm")), ["kvm-denied"]);
    assert_eq!(ids(unprivileged(opens)), [] as [&str; 0]);
}

#[test]
fn cache() {
    let long = format!("/tmp/{}", "x".repeat(60));
    let runs = "mkdir $S/c/runs; chmod 700 $S/c/runs; chown 65534 $S/c/runs";
    let cases = vec![
        (Host::new().after("mount -t tmpfs -o size=64m,mode=700 tmpfs $S/c"), "disk", true),
        // A ramfs refuses O_DIRECT, as some FUSE file systems do.
        (Host::new().after("mount -t ramfs -o mode=700 ramfs $S/c"), "cache-direct", true),
        (Host::new().with("IOT_XTASK_CACHE", long), "cache-path", true),
        (Host::new().with("IOT_XTASK_CACHE", "not/absolute"), "cache", true),
        (Host::new().after("chmod 777 $S/c"), "cache", true),
        (Host::new().after("mount -t tmpfs -o ro,mode=700 tmpfs $S/c"), "cache-access", true),
        (Host::new().after(runs).without(OVERRIDES), "cache-access", true),
    ];
    assert_each_finds("cache", cases);
    // The cache is a private directory of another user.
    let private = Host::new().after("chmod 700 $S/c; chown 65534 $S/c").without(OVERRIDES).preflight();
    assert!(private.blocking.contains("cache"), "{:#}", private.json);
    let own = Host::new().after("chmod 700 $S/c").without(OVERRIDES).preflight();
    assert!(!own.ids.contains("cache-access"), "{:#}", own.json);
}

#[test]
fn a_run_that_died() {
    let host = Host::new();
    let (run, _) = RunDir::create(&Cache::at(&host.scratch.path().join("c")), || Ok(())).unwrap();
    assert!(!host.preflight().ids.contains("stale-run"), "the run is alive");
    drop(run);
    host.assert_finds("stale-run", false);
}

#[test]
fn a_clock_that_is_behind() {
    let mut host = Host::new();
    host.program = host.file("xtask");
    host.after("cp $XTASK $S/xtask; touch --date '2 days' $S/xtask")
        .with("XTASK", XTASK)
        .assert_finds("clock", true);
}

#[test]
fn a_kvm_that_is_asked_for_and_not_there_is_told() {
    let host = kvm("", "fpu vmx").asked(&["--arch", host_arch(), "--accel", "kvm"]);
    let output = host.command().output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(message.contains("--accel kvm: /dev/kvm does not open"), "{message}");
}

#[test]
fn a_cpu_that_no_emulator_has_is_a_flag_to_correct() {
    let preflight = ["preflight", "--arch", "aarch64", "--cpu", "cortex-a99"];
    let output = command(XTASK, &preflight).output().unwrap();
    assert_code(&output, 2);
    let message = message(&output);
    assert!(message.contains("has no such 64-bit CPU model; it has: a64fx, cortex-a35,"), "{message}");
    assert!(!message.contains("cortex-m0"), "{message}");
    let many = command(XTASK, &["preflight", "--arch", "aarch64", "--accel", "tcg", "--vcpus", "16"])
        .output()
        .unwrap();
    assert_code(&many, 2);
    assert!(self::message(&many).contains("--vcpus 16: the machine virt"), "{}", self::message(&many));
}
