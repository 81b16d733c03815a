//! The faults of durability that are planted in the guest. Like those of [`super::sabotage`], they change the agent's
//! surroundings and never the agent: a library that is loaded before the C library, drop-ins of the agent's unit, and the
//! installer.

use crate::build::standalone::Standalone;
use crate::cli::DurabilityFault;
use crate::format::name_of;

/// The library that the agent's service loads for a fault of the state file, as a shared library.
pub const LIBRARY: Standalone = Standalone { name: "durability", sources: &["xtask/plants/durability.rs"] };

/// The name of the library's file on the payload.
pub const LIBRARY_FILE: &str = "durability.so";

/// The path of the library in the guest. The unit's `ProtectSystem=` leaves it readable.
const INSTALLED_LIBRARY: &str = "/usr/local/lib/iot-plant.so";

/// The directory in the guest, in memory, with the bundle whose installer has the fault `installer-in-place`.
pub const PLANTED_BUNDLE: &str = "/run/planted";

/// Returns whether a payload with this fault needs the file [`LIBRARY_FILE`].
pub fn needs_library(fault: DurabilityFault) -> bool {
    use DurabilityFault::{DirectoryWithoutSync, RenamedBeforeWritten, StateWithoutSync, TruncatedInPlace};
    matches!(fault, StateWithoutSync | DirectoryWithoutSync | RenamedBeforeWritten | TruncatedInPlace)
}

/// Returns the script that runs before the installer. It may replace `$here`, the directory with the installer.
pub(super) fn script(fault: DurabilityFault) -> String {
    match fault {
        DurabilityFault::StateWithoutSync => preloading(fault, NO_AUTO_DA_ALLOC),
        DurabilityFault::DirectoryWithoutSync
        | DurabilityFault::RenamedBeforeWritten
        | DurabilityFault::TruncatedInPlace => preloading(fault, ""),
        DurabilityFault::InstallerInPlace => {
            format!("cp -r \"$here\" {PLANTED_BUNDLE}\nhere={PLANTED_BUNDLE}\n{}", planted_installer())
        }
        DurabilityFault::PullWithoutSync => drop_in(NO_SYNCFS),
        // The fault is in the workload.
        DurabilityFault::UnsyncedVolume => String::new(),
    }
}

/// Returns the shell command that plants the fault in the installer of the bundle `$here`, a writable directory.
///
/// The planted installer gives each file of the agent and the link its final name before the content is written, and
/// syncs nothing. Images, secrets and the configuration are installed as usual.
fn planted_installer() -> String {
    format!("sed -i '{}' \"$here/install.sh\"", IN_PLACE.join("\n"))
}

/// These commands of sed change the functions `write` and `rename`, the link and each sync of `install.sh`. Each of them
/// must apply.
const IN_PLACE: [&str; 4] = [
    r#"s|^    install -D -m "$1" "$2" "$3.new"$|    install -D -m "$1" "$2" "$3"|"#,
    r#"s|^    mv -fT "$1.new" "$1"$|    [ ! -e "$1.new" ] \|\| mv -fT "$1.new" "$1"|"#,
    r#"s|^ln -sfn "$new/iot-agent" "$link.new"$|ln -sfn "$new/iot-agent" "$link"|"#,
    r#"s|^\( *\)sync\( .*\)\{0,1\}$|\1true|"#,
];

/// Returns a script that makes the agent's service load the library. `more` are further lines of its drop-in.
fn preloading(fault: DurabilityFault, more: &str) -> String {
    let environment = format!(
        "Environment=LD_PRELOAD={INSTALLED_LIBRARY} IOT_PLANT={} IOT_PLANT_STATE=/var/lib/iot-agent/state\n{more}",
        name_of(&fault)
    );
    format!(
        "install -D -m 0644 \"$here/{LIBRARY_FILE}\" {INSTALLED_LIBRARY}\n{}",
        drop_in(environment.trim_end())
    )
}

/// With this line, ext4 does not allocate the blocks of a file when the file is renamed over another one (ext4(5),
/// `auto_da_alloc`). Otherwise, the sync of the directory would write the content, too. Other file systems do not have
/// this option.
const NO_AUTO_DA_ALLOC: &str = "ExecStartPre=+/bin/mount -o remount,noauto_da_alloc /";

/// With these lines, the system call with which the agent syncs images and containers returns at once. Its other calls,
/// and all calls of podman, still wait for the disk. The lines replace the list of allowed system calls, because an
/// exception to such a list cannot return success.
const NO_SYNCFS: &str = "SystemCallFilter=\nSystemCallFilter=~syncfs:0";

/// Returns a script that makes a drop-in of the agent's unit with these lines in its section `[Service]`.
fn drop_in(lines: &str) -> String {
    format!(
        "mkdir -p /etc/systemd/system/iot-agent.service.d\n\
         cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'\n[Service]\n{lines}\nEND\nsync"
    )
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use clap::ValueEnum as _;

    use super::*;
    use crate::arch::VmArchitecture;
    use crate::cache::Cache;
    use crate::workspace::Workspace;

    /// The planted library, a library after it that prints the calls which reach the C library, and a program that
    /// saves a state with the code of the agent.
    struct Agent {
        directory: tempfile::TempDir,
        libraries: String,
    }

    impl Agent {
        fn make() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let workspace = Workspace::find().unwrap();
            let cache = Cache::at(directory.path());
            let host = VmArchitecture::of_host().unwrap();
            let recorder = Standalone { name: "record", sources: &["xtask/core/test_data/record_calls.rs"] };
            let libraries = [LIBRARY, recorder].map(|library| {
                let (_, path) = library.shared_library(&workspace, &cache, host).unwrap();
                path.into_os_string().into_string().unwrap()
            });
            let source = directory.path().join("save.rs");
            std::fs::write(&source, SAVE.replace("ROOT", workspace.root().to_str().unwrap())).unwrap();
            let mut rustc = Command::new("rustc");
            rustc.args(["--edition=2024", "-o"]).arg(directory.path().join("save")).arg(&source);
            assert!(rustc.status().unwrap().success());
            Self { directory, libraries: libraries.join(":") }
        }

        fn state(&self) -> PathBuf {
            self.directory.path().join("data/state")
        }

        /// Saves `content`, and returns the calls and an error that the program has printed.
        fn save(&self, fault: &str, content: &str) -> String {
            let mut command = Command::new(self.directory.path().join("save"));
            command.arg(self.state()).arg(content).env("LD_PRELOAD", &self.libraries);
            command.env("IOT_PLANT", fault).env("IOT_PLANT_STATE", self.state());
            String::from_utf8(command.output().unwrap().stderr).unwrap()
        }
    }

    /// The program saves a state as `Store::save` does.
    const SAVE: &str = r#"
        #[allow(dead_code)]
        #[path = "ROOT/agent/src/files.rs"]
        mod files;

        fn main() -> std::io::Result<()> {
            let arguments: Vec<_> = std::env::args().collect();
            let path = std::path::PathBuf::from(&arguments[1]);
            if path.is_file() {
                files::keep(&path, &path.with_file_name("state.old"))?;
            }
            files::replace_durably(&path, arguments[2].as_bytes())?;
            // The plant must not change how other files are written.
            files::replace_durably(&path.with_file_name("other"), b"abc")
        }"#;

    const KEPT: &str = "rename state.link state.old\n";
    const OTHER: &str =
        "open other.new\nsync other.new of 3 bytes\nrename other.new other\nsync the directory\n";

    #[test]
    fn the_library_changes_how_the_agents_state_is_written() {
        let agent = Agent::make();
        for (fault, calls, earlier) in [
            (
                "none",
                "open state.new\nsync state.new of 6 bytes\nrename state.new state\nsync the directory\n",
                "first",
            ),
            ("state-without-sync", "open state.new\nrename state.new state\nsync the directory\n", "first"),
            (
                "directory-without-sync",
                "open state.new\nsync state.new of 6 bytes\nrename state.new state\n",
                "first",
            ),
            // At the first sync, the name has an empty file. This is the state of the disk that the plant must leave.
            (
                "renamed-before-written",
                "open state.new\nrename state.new state\nsync state of 0 bytes\nsync state of 6 bytes\n\
                 sync the directory\n",
                "first",
            ),
            // The earlier state has the inode that is written in place.
            (
                "truncated-in-place",
                "open state\nsync state of 0 bytes\nsync state of 6 bytes\nsync the directory\n",
                "second",
            ),
        ] {
            let directory = agent.state().parent().unwrap().to_owned();
            std::fs::create_dir(&directory).unwrap();
            agent.save("none", "first");
            let mut other = OTHER.to_owned();
            if fault == "directory-without-sync" {
                other = other.replace("sync the directory\n", "");
            }
            assert_eq!(agent.save(fault, "second"), format!("{KEPT}{calls}{other}"), "{fault}");
            let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
            assert_eq!((read("state").as_str(), read("state.old").as_str()), ("second", earlier), "{fault}");
            assert!(!directory.join("state.new").exists(), "{fault}");
            std::fs::remove_dir_all(directory).unwrap();
        }
    }

    #[test]
    fn each_fault_of_the_state_file_is_one_of_the_library() {
        let source = include_str!("../../../plants/durability.rs");
        let mut scripts = String::new();
        for fault in DurabilityFault::value_variants() {
            let name = name_of(fault);
            assert_eq!(source.contains(&format!("b\"{name}\"")), needs_library(*fault), "{name}");
            let script = script(*fault);
            assert_eq!(script.contains(LIBRARY_FILE), needs_library(*fault), "{name}");
            scripts += &format!("# {name}\n{script}\n\n");
        }
        crate::golden::compare("durability.sh", scripts);
        // These are the calls of `SAVE` above.
        let store = agent_source("store.rs");
        assert!(store.contains("files::keep(&path") && store.contains("files::replace_durably(&path"));
    }

    #[test]
    fn the_planted_installer_writes_in_place_and_syncs_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (bundle, sound) = (directory.path(), include_str!("../../../../agent/dist/install.sh"));
        std::fs::write(bundle.join("install.sh"), sound).unwrap();
        let ran = Command::new("sh").args(["-c", &planted_installer()]).env("here", bundle).status().unwrap();
        assert!(ran.success());
        let planted = std::fs::read_to_string(bundle.join("install.sh")).unwrap();
        assert_eq!(sound.lines().count(), planted.lines().count());
        let changed: Vec<_> = sound.lines().zip(planted.lines()).filter(|(a, b)| a != b).collect();
        assert_eq!(
            changed,
            [
                (r#"    install -D -m "$1" "$2" "$3.new""#, r#"    install -D -m "$1" "$2" "$3""#),
                (r#"    mv -fT "$1.new" "$1""#, r#"    [ ! -e "$1.new" ] || mv -fT "$1.new" "$1""#),
                (r#"    sync "$new/iot-agent.new""#, "    true"),
                (r#"ln -sfn "$new/iot-agent" "$link.new""#, r#"ln -sfn "$new/iot-agent" "$link""#),
                ("sync", "true"),
                ("sync", "true"),
            ]
        );
        // It syncs files before the planted installer has written any.
        assert!(sound.find("prerequisites.sh\"") < sound.find("write 0755 \"$here"));
    }

    /// The filter of `pull-without-sync` returns success for syncfs(2) alone.
    #[test]
    fn the_agent_syncs_file_systems_by_the_call_that_the_filter_stops() {
        let (mut directories, mut found) = (vec![root().join("agent/src")], Vec::new());
        while let Some(directory) = directories.pop() {
            for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let calls = ["fs::syncfs(", "fs::sync(", "sync_file_range", "\"sync\""];
                found.extend(calls.into_iter().flat_map(|call| text.matches(call)).map(str::to_owned));
            }
        }
        assert_eq!(found, ["fs::syncfs("]);
        assert!(agent_source("images/download.rs").contains("store.sync_file_system()?;"));
    }

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    fn agent_source(name: &str) -> String {
        std::fs::read_to_string(root().join("agent/src").join(name)).unwrap()
    }
}
