//! Instances: machines that continue to exist after the command that made them. `vm up` and `smoke --keep` make
//! instances, and the other `vm` commands work with them. The directory of a run is an instance if it has the file
//! `kept`. An instance is not collected, even if its QEMU has ended. Only `vm rm` deletes it.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{GUARD, KEPT, RunDir, has_form_of_id, other_host};
use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::error::Failure;
use crate::fs::{directories, lock, remove_tree, try_lock, write_atomically};
use crate::output::write;
use crate::processes::{end_processes, owned};
use crate::{bail_host, limits};

/// The schema number of the file `kept` and of the output of `vm list --json`.
pub const SCHEMA: u32 = 1;
/// The name of the guest in known_hosts. ssh cannot use the guest's address there, because its port changes with every
/// start.
const HOST_ALIAS: &str = "iot-device";

/// The contents of the file `kept`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// The schema number, [`SCHEMA`].
    pub schema: u32,
    /// The id of the run that made the instance. The instance's directory has this name.
    pub id: String,
    /// The name that the user gave; otherwise the id of the run.
    pub name: String,
    pub arch: VmArchitecture,
    /// The name of the image from which the instance was made.
    pub image: String,
    /// The time at which the instance was made, in RFC 3339, UTC.
    pub made_at: String,
    /// The user that ssh logs in as.
    pub login_user: String,
    /// The port on this host's loopback that QEMU forwards to the guest's sshd. It is set at each start.
    pub ssh_port: Option<u16>,
    /// The log of the serial console.
    pub console: PathBuf,
    /// The libvirt daemon that runs the machine; `None` for the embedded driver.
    #[serde(default)]
    pub daemon: Option<DaemonRecord>,
}

/// The libvirt daemon that runs a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonRecord {
    /// The URI of `--connect`.
    pub uri: String,
    /// The way to the guest's sshd. It is set at each start, and `None` while the machine is off.
    pub route: Option<Route>,
}

/// An instance and its directory.
#[derive(Debug, Clone)]
pub struct Instance {
    pub machine: InstanceRecord,
    pub directory: PathBuf,
}

impl Instance {
    /// Returns the run's working directory.
    pub fn work(&self) -> PathBuf {
        self.directory.join("w")
    }

    /// Returns whether a process of the instance is alive. This is also true if the guest has shut down, because QEMU
    /// keeps running.
    pub fn has_processes(&self) -> bool {
        !owned(&self.work()).is_empty()
    }

    /// Returns the arguments with which ssh enters the guest.
    ///
    /// # Errors
    /// Returns a failure of the host if the instance has no QEMU.
    pub fn ssh(&self) -> Result<Vec<OsString>> {
        let name = &self.machine.name;
        if let Some(daemon) = &self.machine.daemon {
            let route = daemon.route.as_ref().ok_or_else(|| self.off(&format!("enter {name}")))?;
            return Ok(ssh_arguments_by(&self.work(), &self.machine.login_user, route));
        }
        match self.machine.ssh_port.filter(|_| self.has_processes()) {
            Some(port) => Ok(ssh_arguments(&self.work(), &self.machine.login_user, port)),
            None => Err(self.off(&format!("enter {name}")).into()),
        }
    }

    /// Returns the failure of a command that needs a running instance.
    pub fn off(&self, attempted: &str) -> Failure {
        let name = &self.machine.name;
        let hint = format!("boot it with cargo xtask vm start {name}");
        Failure::host(format!("{attempted}: the machine is off"), hint)
    }

    /// Takes the lock of the instance. While this lock is held, no other command can start, stop or remove the
    /// instance.
    ///
    /// # Errors
    /// Returns a failure of the host if another command, or the run that made the instance, still holds the lock. Also
    /// returns a failure of the host if the instance belongs to another host that shares the cache.
    pub fn lock(&self) -> Result<File> {
        let name = &self.machine.name;
        if let Some(host) = other_host(&self.directory)? {
            bail_host!("use {name}: the machine belongs to the host {host}"; "run the command on {host}");
        }
        match try_lock(&self.directory.join("lock"))? {
            Some(lock) => Ok(lock),
            None => bail_host!(
                "{name}: another command is using it, or the run that made it has not ended";
                "wait until it ends"
            ),
        }
    }

    /// Writes the record to the instance's directory.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be written.
    pub fn save(&self) -> Result<()> {
        write_atomically(&self.directory.join(KEPT), serde_json::to_string_pretty(&self.machine)?)
    }
}

/// The log file that QEMU writes with the output of a guest on its serial console.
#[derive(Debug)]
pub struct ConsoleLog(fs_err::File);

impl ConsoleLog {
    /// Opens the log at its beginning.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(fs_err::File::open(path)?))
    }

    /// Writes the output that is new since the last call to stdout. Returns whether stdout still has a reader.
    ///
    /// # Errors
    /// Returns an error if the log cannot be read or stdout cannot be written.
    pub fn show(&mut self) -> Result<bool> {
        let mut output = Vec::new();
        self.0.read_to_end(&mut output)?;
        write(&output)
    }
}

/// Returns all instances, sorted by name.
pub fn all(cache: &Cache) -> Vec<Instance> {
    let read = |directory: PathBuf| {
        let text = std::fs::read(directory.join(KEPT)).ok()?;
        let machine: InstanceRecord = serde_json::from_slice(&text).ok()?;
        // `vm rm` deletes directories from this list. Therefore the list must not contain a copy of an instance or a
        // directory of another program.
        let is_own = has_form_of_id(&machine.id) && directory.ends_with(&machine.id);
        is_own.then_some(Instance { machine, directory })
    };
    let mut instance: Vec<_> = directories(&cache.runs()).into_iter().filter_map(read).collect();
    instance.sort_by_cached_key(|one| (one.machine.name.clone(), one.machine.id.clone()));
    instance
}

/// Returns the instance with this name or id. Without a name, returns the only instance.
///
/// # Errors
/// Returns a usage error that lists the existing names if there is no such instance. Without a name, returns this error
/// if there is not exactly one instance.
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

/// Checks that no instance has this name yet.
///
/// # Errors
/// Returns a usage error if an instance has this name.
pub fn check_name(cache: &Cache, name: &str) -> Result<(), Failure> {
    match all(cache).iter().find(|instance| instance.machine.name == name || instance.machine.id == name) {
        None => Ok(()),
        Some(_) => Err(Failure::usage(format!(
            "keep a machine as {name}: a machine of this name exists; remove it with cargo xtask vm rm {name}, or \
             choose another name"
        ))),
    }
}

/// Makes the run an instance, by writing the file `kept`. `check` can end the wait for another process that collects or
/// makes a run.
///
/// # Errors
/// Returns an error if the name is taken, or if a file cannot be written, or the error of `check`.
pub fn keep(
    run: &RunDir,
    cache: &Cache,
    machine: InstanceRecord,
    check: impl Fn() -> Result<()>,
) -> Result<()> {
    let _guard = lock(&cache.runs().join(GUARD), check)?;
    check_name(cache, &machine.name)?;
    Instance { machine, directory: run.path().to_owned() }.save()
}

/// Ends the processes of an instance, deletes its directory, and returns the number of processes that were ended.
/// `first` removes what the instance has elsewhere. If it fails, nothing is deleted, because the directory is the record
/// of all that.
///
/// # Errors
/// Returns an error if another command holds the lock of the instance, if a process cannot be ended, or if a file
/// cannot be deleted, or the error of `first`.
pub fn remove(kept: &Instance, first: impl FnOnce() -> Result<()>) -> Result<usize> {
    let _lock = kept.lock()?;
    first()?;
    // No other command may read the directories while one of them is deleted.
    let _guard = kept.directory.parent().map(|runs| lock(&runs.join(GUARD), || Ok(()))).transpose()?;
    let processes = end_processes(&kept.work())?;
    remove_tree(&kept.directory)?;
    Ok(processes)
}

/// The way from this host to the sshd of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// The address of the guest, or of the host that forwards a port to the guest.
    pub address: String,
    pub port: u16,
    /// ssh's option `ProxyCommand` for the way to another host; `None` for this host.
    pub proxy_command: Option<String>,
}

/// Returns the arguments with which ssh enters the guest behind `port` of this host's loopback, with the keys in the
/// directory `keys`.
pub fn ssh_arguments(keys: &Path, login_user: &str, port: u16) -> Vec<OsString> {
    let route = Route { address: "127.0.0.1".to_owned(), port, proxy_command: None };
    ssh_arguments_by(keys, login_user, &route)
}

/// Returns the arguments with which ssh enters a guest by `route`, with the keys in the directory `keys`.
pub fn ssh_arguments_by(keys: &Path, login_user: &str, route: &Route) -> Vec<OsString> {
    let option = |name: &str, value: &Path| OsString::from(format!("-o{name}={}", value.display()));
    let proxy = route.proxy_command.as_ref().map(|command| format!("-oProxyCommand={command}").into());
    let mut arguments = vec![
        "-F/dev/null".into(),
        "-oBatchMode=yes".into(),
        "-oStrictHostKeyChecking=yes".into(),
        format!("-oHostKeyAlias={HOST_ALIAS}").into(),
        "-oIdentitiesOnly=yes".into(),
        "-oLogLevel=ERROR".into(),
        format!("-oConnectTimeout={}", limits::SSH_CONNECT.as_secs()).into(),
        option("UserKnownHostsFile", &keys.join("known_hosts")),
        option("IdentityFile", &keys.join("user_key")),
        format!("-p{}", route.port).into(),
    ];
    arguments.extend(proxy);
    arguments.push(format!("{login_user}@{}", route.address).into());
    arguments
}

/// Returns the line of known_hosts for a guest with this host key.
pub fn known_host(public_key: &str) -> String {
    format!("{HOST_ALIAS} {public_key}\n")
}

#[cfg(test)]
mod tests {
    use super::super::HOST;
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
            daemon: None,
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
        // `vm rm` must not delete a copy of an instance's directory.
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
    fn a_taken_name_is_a_usage_error() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        instance(&cache, "1124-100000-0001", "dev");
        check_name(&cache, "other").unwrap();
        for name in ["dev", "1124-100000-0001"] {
            let error = check_name(&cache, name).unwrap_err();
            assert_eq!(error.kind.exit_code(), 2);
            assert!(error.to_string().contains(&format!("vm rm {name}")), "{error}");
        }
    }

    #[test]
    fn a_machine_that_is_off_is_not_entered() {
        let directory = tempfile::tempdir().unwrap();
        let instance = instance(&Cache::at(directory.path()), "1124-100000-0001", "dev");
        let error = instance.ssh().unwrap_err();
        assert!(error.to_string().contains("the machine is off"), "{error:#}");
        assert!(crate::error::hint(&error).unwrap().contains("vm start dev"));
        let held = instance.lock().unwrap();
        assert!(instance.lock().is_err());
        drop(held);
        assert!(remove(&instance, || anyhow::bail!("no answer")).is_err());
        assert!(instance.work().exists(), "nothing is deleted");
        std::fs::write(instance.directory.join(HOST), "another-boot another-host\n").unwrap();
        assert!(instance.lock().unwrap_err().to_string().contains("another-host"));
    }
}
