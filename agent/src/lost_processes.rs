//! Ends processes of containers that podman no longer has. If podman is killed while it makes a container's process,
//! its database does not have the process. Podman then deletes the container and leaves the process, which waits for
//! its start forever.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

/// Ends the monitors of containers (conmon(8)) whose ids are not in `known`, and the processes that they monitor.
/// Returns the number of these monitors.
pub(crate) fn end(storage: &Path, known: &HashSet<String>) -> usize {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    let mut count = 0;
    for process in entries.map_while(Result::ok).map(|entry| entry.path()) {
        let Some(id) = monitored(&process, storage).filter(|id| !known.contains(id)) else { continue };
        // The monitor comes first: when its container ends, it would start podman.
        let children = children(&process);
        for pid in pid(&process).into_iter().chain(children) {
            // The process may have ended meanwhile.
            if let Err(error) = kill_process(pid, Signal::KILL) {
                tracing::debug!("end a process of the container {id}: {error}");
            }
        }
        count += 1;
    }
    count
}

/// Returns the id of the container in this storage that a process monitors.
fn monitored(process: &Path, storage: &Path) -> Option<String> {
    let command = fs::read(process.join("cmdline")).ok()?;
    let mut arguments = command.split(|byte| *byte == 0).map(|argument| String::from_utf8_lossy(argument));
    let program = PathBuf::from(arguments.next()?.as_ref());
    if program.file_name()? != "conmon" {
        return None;
    }
    let bundles = storage.join("overlay-containers");
    arguments.find_map(|argument| {
        let below = Path::new(argument.as_ref()).strip_prefix(&bundles).ok()?;
        below.components().next().map(|id| id.as_os_str().to_string_lossy().into_owned())
    })
}

fn pid(process: &Path) -> Option<Pid> {
    Pid::from_raw(process.file_name()?.to_str()?.parse().ok()?)
}

fn children(process: &Path) -> Vec<Pid> {
    let Some(name) = process.file_name() else { return Vec::new() };
    let text = fs::read_to_string(process.join("task").join(name).join("children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn only_the_processes_of_unknown_containers_are_ended() {
        let directory = tempfile::tempdir().unwrap();
        let storage = directory.path().join("storage");
        let conmon = directory.path().join("conmon");
        symlink("/bin/sh", &conmon).unwrap();
        let start = |storage: &Path, id: &str| {
            let bundle = storage.join("overlay-containers").join(id).join("userdata");
            Command::new(&conmon).args(["-c", "sleep 600; :", "-b"]).arg(bundle).spawn().unwrap()
        };
        let of_child = |monitor: &Child| {
            let process = PathBuf::from(format!("/proc/{}", monitor.id()));
            let deadline = Instant::now() + Duration::from_secs(30);
            loop {
                if let [pid] = children(&process)[..] {
                    return PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
                }
                assert!(Instant::now() < deadline, "no child");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        let mut orphan = start(&storage, "a");
        let mut others = [start(&storage, "b"), start(&directory.path().join("other"), "a")];
        let child = of_child(&orphan);
        let of_others = others.each_ref().map(of_child);
        assert_eq!(end(&storage, &HashSet::from(["b".to_owned()])), 1);
        orphan.wait().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        // The child may stay as a zombie, depending on the first process.
        while fs::read(child.join("cmdline")).is_ok_and(|command| !command.is_empty()) {
            assert!(Instant::now() < deadline, "the process of the container runs");
            std::thread::sleep(Duration::from_millis(10));
        }
        for (other, child) in others.iter_mut().zip(of_others) {
            assert!(other.try_wait().unwrap().is_none());
            other.kill().unwrap();
            other.wait().unwrap();
            kill_process(pid(&child).unwrap(), Signal::KILL).unwrap();
        }
    }
}
