//! Machines that outlive the command that made them: `vm up` and `smoke --keep` leave one, `cargo xtask vm` works with them. A run's
//! directory with a file `kept` is one; nobody collects it, whatever became of its QEMU, until somebody removes it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{KEPT, RunDir, has_form_of_id};
use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::error::Failure;
use crate::fs::{directories, lock, remove_tree, try_lock, write_atomically};
use crate::processes::{end_processes, owned};
use crate::{bail_host, limits};

/// The schema of `kept` and of `vm list --json`.
pub const SCHEMA: u32 = 1;
/// The name that stands for the guest in known_hosts: its port changes with every start.
const HOST_ALIAS: &str = "iot-device";

/// What is known of an instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The run that made it, and its directory's name.
    pub id: String,
    /// What people call it; the run's name where nobody said another.
    pub name: String,
    pub arch: VmArchitecture,
    /// The image that it was made from.
    pub image: String,
    /// When it was made, RFC 3339, UTC.
    pub made_at: String,
    /// Whom ssh enters as.
    pub login_user: String,
    /// The port of this host's loopback that leads to its ssh, since it was started last.
    pub ssh_port: Option<u16>,
    /// What its serial console has said.
    pub console: PathBuf,
}

/// An instance and where it is.
#[derive(Debug, Clone)]
pub struct Instance {
    /// What is known of it.
    pub machine: InstanceRecord,
    /// The run's directory.
    pub directory: PathBuf,
}

impl Instance {
    /// The run's working directory.
    pub fn work(&self) -> PathBuf {
        self.directory.join("w")
    }

    /// Whether its QEMU is there.
    pub fn is_running(&self) -> bool {
        !owned(&self.work()).is_empty()
    }

    /// ssh's arguments that lead into it.
    ///
    /// # Errors
    /// A failure of the host where it does not run.
    pub fn ssh(&self) -> Result<Vec<OsString>> {
        let name = &self.machine.name;
        match self.machine.ssh_port.filter(|_| self.is_running()) {
            Some(port) => Ok(ssh_arguments(&self.work(), &self.machine.login_user, port)),
            None => bail_host!("enter {name}: the machine is off"; "cargo xtask vm start {name}"),
        }
    }

    /// Nobody else starts, stops or removes it while the lock is held.
    ///
    /// # Errors
    /// A failure of the host where another command has it.
    pub fn lock(&self) -> Result<File> {
        let name = &self.machine.name;
        match try_lock(&self.directory.join("lock"))? {
            Some(lock) => Ok(lock),
            None => bail_host!(
                "{name}: another command is using it, or the run that made it has not ended";
                "wait until it ends"
            ),
        }
    }

    /// Writes down what changed.
    ///
    /// # Errors
    /// Names the file.
    pub fn save(&self) -> Result<()> {
        write_atomically(&self.directory.join(KEPT), serde_json::to_string_pretty(&self.machine)?)
    }
}

/// What a guest has said on its serial console, from QEMU's log of it.
#[derive(Debug)]
pub struct ConsoleLog(fs_err::File);

impl ConsoleLog {
    /// From its beginning.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(fs_err::File::open(path)?))
    }

    /// To stdout all that it has not shown yet; whether anybody still reads that.
    ///
    /// # Errors
    /// Where the one cannot be read or the other not be written.
    pub fn show(&mut self) -> Result<bool> {
        let mut output = Vec::new();
        self.0.read_to_end(&mut output)?;
        let mut out = std::io::stdout().lock();
        match out.write_all(&output).and_then(|()| out.flush()) {
            // Whoever reads may have read enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            written => written.context("write to stdout").map(|()| true),
        }
    }
}

/// Every instance, by name.
pub fn all(cache: &Cache) -> Vec<Instance> {
    let read = |directory: PathBuf| {
        let text = std::fs::read(directory.join(KEPT)).ok()?;
        let machine: InstanceRecord = serde_json::from_slice(&text).ok()?;
        // A copy of an instance, and a directory of another program, is not one: `vm rm` deletes what is listed here.
        let is_own = has_form_of_id(&machine.id) && directory.ends_with(&machine.id);
        is_own.then_some(Instance { machine, directory })
    };
    let mut instance: Vec<_> = directories(&cache.runs()).into_iter().filter_map(read).collect();
    instance.sort_by_cached_key(|one| (one.machine.name.clone(), one.machine.id.clone()));
    instance
}

/// The one with this name or of this run; without a name the only one there is.
///
/// # Errors
/// A usage error, with the names that there are.
pub fn find(cache: &Cache, name: Option<&str>) -> Result<Instance, Failure> {
    let mut instance = all(cache);
    let names: Vec<_> = instance.iter().map(|instance| instance.machine.name.clone()).collect();
    let there =
        if names.is_empty() { "none; make one with cargo xtask vm up".to_owned() } else { names.join(", ") };
    match name {
        None if instance.len() == 1 => Ok(instance.remove(0)),
        None => Err(Failure::usage(format!("which machine? there are: {there}"))),
        Some(name) => instance
            .into_iter()
            .find(|instance| instance.machine.name == name || instance.machine.id == name)
            .ok_or_else(|| Failure::usage(format!("{name}: no such machine; there are: {there}"))),
    }
}

/// An error where another machine has this name already.
///
/// # Errors
/// A failure of the host, with what to do.
pub fn check_name(cache: &Cache, name: &str) -> Result<(), Failure> {
    match all(cache).iter().find(|instance| instance.machine.name == name || instance.machine.id == name) {
        None => Ok(()),
        Some(_) => Err(Failure::host(
            format!("keep a machine as {name}: a machine of this name exists"),
            format!("remove it with cargo xtask vm rm {name}, or choose another name"),
        )),
    }
}

/// Leaves a run's machine to the person who asked for it.
///
/// # Errors
/// Names the file that cannot be written.
pub fn keep(run: &RunDir, cache: &Cache, machine: InstanceRecord) -> Result<()> {
    let _guard = lock(&cache.runs().join(".lock"))?;
    check_name(cache, &machine.name)?;
    Instance { machine, directory: run.path().to_owned() }.save()
}

/// Stops a kept machine and deletes its directory; how many processes it had.
///
/// # Errors
/// Where its run has not ended, a process cannot be ended or a file not deleted.
pub fn remove(kept: &Instance) -> Result<usize> {
    let _lock = kept.lock()?;
    // Nobody looks at the directories while one of them goes.
    let _guard = kept.directory.parent().map(|runs| lock(&runs.join(".lock"))).transpose()?;
    let processes = end_processes(&kept.work())?;
    remove_tree(&kept.directory)?;
    Ok(processes)
}

/// What leads into the guest behind `port`, with the keys in `keys`.
pub fn ssh_arguments(keys: &Path, login_user: &str, port: u16) -> Vec<OsString> {
    let option = |name: &str, value: &Path| OsString::from(format!("-o{name}={}", value.display()));
    vec![
        "-F/dev/null".into(),
        "-oBatchMode=yes".into(),
        "-oStrictHostKeyChecking=yes".into(),
        format!("-oHostKeyAlias={HOST_ALIAS}").into(),
        "-oIdentitiesOnly=yes".into(),
        "-oLogLevel=ERROR".into(),
        format!("-oConnectTimeout={}", limits::SSH_CONNECT.as_secs()).into(),
        option("UserKnownHostsFile", &keys.join("known_hosts")),
        option("IdentityFile", &keys.join("user_key")),
        format!("-p{port}").into(),
        format!("{login_user}@127.0.0.1").into(),
    ]
}

/// The line of known_hosts for a guest with this host key.
pub fn known_host(public_key: &str) -> String {
    format!("{HOST_ALIAS} {public_key}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(cache: &Cache, id: &str, name: &str) -> Instance {
        let directory = cache.runs().join(id);
        std::fs::create_dir_all(directory.join("w")).unwrap();
        let machine = InstanceRecord {
            schema: SCHEMA,
            id: id.to_owned(),
            name: name.to_owned(),
            arch: VmArchitecture::Aarch64,
            image: "debian-12".to_owned(),
            made_at: "2026-11-24T10:00:00Z".to_owned(),
            login_user: "debian".to_owned(),
            ssh_port: Some(40022),
            console: directory.join("console.log"),
        };
        let instance = Instance { machine, directory };
        instance.save().unwrap();
        instance
    }

    #[test]
    fn a_machine_is_found_by_its_name_by_its_run_and_alone() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        assert!(find(&cache, None).unwrap_err().to_string().contains("vm up"));
        instance(&cache, "1124-100000-0001", "dev");
        assert_eq!(find(&cache, None).unwrap().machine.id, "1124-100000-0001");
        // Copies of an instance's directory are not instances: `vm rm` would delete them.
        for copy in ["backup", "1124-100000-0009"] {
            let kept = cache.runs().join(copy).join(KEPT);
            std::fs::create_dir_all(kept.parent().unwrap()).unwrap();
            std::fs::copy(cache.runs().join("1124-100000-0001").join(KEPT), kept).unwrap();
        }
        assert_eq!(all(&cache).len(), 1);
        instance(&cache, "1124-100000-0002", "1124-100000-0002");
        assert!(find(&cache, None).unwrap_err().to_string().contains("1124-100000-0002, dev"));
        assert_eq!(find(&cache, Some("dev")).unwrap().machine.id, "1124-100000-0001");
        assert_eq!(find(&cache, Some("1124-100000-0001")).unwrap().machine.name, "dev");
        assert!(
            find(&cache, Some("other")).unwrap_err().to_string().contains("there are: 1124-100000-0002, dev")
        );
    }

    #[test]
    fn a_machine_that_is_off_is_not_entered() {
        let directory = tempfile::tempdir().unwrap();
        let instance = instance(&Cache::at(directory.path()), "1124-100000-0001", "dev");
        let error = instance.ssh().unwrap_err();
        assert!(error.to_string().contains("the machine is off"), "{error:#}");
        assert!(crate::error::hint(&error).unwrap().contains("vm start dev"));
        let _held = instance.lock().unwrap();
        assert!(instance.lock().is_err());
    }
}
