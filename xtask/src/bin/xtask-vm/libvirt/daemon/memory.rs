//! The memory of a machine on a daemon of this host. libvirt restores a saved machine only under the same name and
//! UUID (libvirt 9.0, virDomainRestoreFlags), so two runs could not use one snapshot at the same time. QEMU itself has no
//! such rule. QEMU therefore writes the memory into a pipe and reads it from one, as it does for libvirt. libvirt passes
//! the pipe on, so that neither the daemon nor QEMU needs access to the user's cache.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{PipeWriter, Write as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::stream::Stream;
use xtask_core::host::firmware::{self, AarchFirmware};
use xtask_core::limits;
use xtask_core::machine::DomainXmlParams;
use xtask_core::machine::xml::{domain_xml, without_disks};

use super::run_domain::RunDomain;
use crate::guest::monitor::returned;
use crate::libvirt::{Condition, Machine};

/// QEMU's name of the end of the pipe that it has.
const PIPE: &str = "memory";
/// QEMU's name of the file with the firmware's code, as libvirt chooses it.
const CODE: &str = "libvirt-pflash0-storage";

/// libvirt's function (libvirt-qemu.h). It exists since libvirt 8.2, so the program must not be linked against it.
type CommandWithFiles = unsafe extern "C" fn(
    virt::sys::virDomainPtr,
    *const c_char,
    c_uint,
    *mut c_int,
    *mut c_uint,
    *mut *mut c_int,
    *mut *mut c_char,
    c_uint,
) -> c_int;

fn command_with_files() -> Option<CommandWithFiles> {
    // SAFETY: the name ends with a NUL byte.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"virDomainQemuMonitorCommandWithFiles".as_ptr()) };
    // SAFETY: libvirt's function of this name has this type.
    (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, CommandWithFiles>(found) })
}

/// Gives QEMU a file under the name [`PIPE`] (QEMU, `getfd`).
fn give(domain: &Domain, file: &impl AsFd) -> Result<Value> {
    let call = command_with_files().context("this host's libvirt is older than 8.2")?;
    let question = json!({ "execute": "getfd", "arguments": { "fdname": PIPE } }).to_string();
    let command = CString::new(question)?;
    let mut files = [file.as_fd().as_raw_fd()];
    let mut answer: *mut c_char = std::ptr::null_mut();
    // SAFETY: all pointers are valid during the call, and the function allows null for the files of an answer.
    let status = unsafe {
        call(
            domain.as_ptr(),
            command.as_ptr(),
            1,
            files.as_mut_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw mut answer,
            virt::sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT,
        )
    };
    if status < 0 {
        return Err(Error::last_error().into());
    }
    // SAFETY: after success, libvirt has stored a string, which this function owns.
    let text = unsafe { CStr::from_ptr(answer) }.to_string_lossy().into_owned();
    // SAFETY: see above. The string is not used after this.
    unsafe { libc::free(answer.cast()) };
    returned(&text)
}

impl RunDomain {
    /// Returns the reason why this libvirt cannot save and restore machines, or `None` if it can. The domain is defined
    /// and does not run.
    pub(crate) fn against_snapshots(&self) -> Result<Option<String>> {
        let Ok((reader, _writer)) = std::io::pipe() else {
            return Ok(Some("this host makes no pipe".to_owned()));
        };
        // libvirt looks at the domain last. It checks first whether it knows the call and this user may make it.
        Ok(match give(self.domain()?, &reader) {
            Ok(_) => None,
            Err(error) => match error.downcast_ref::<Error>() {
                Some(refused) if refused.code() == ErrorNumber::OperationInvalid.into() => None,
                _ => Some(format!("libvirt passes no files on to QEMU: {error:#}")),
            },
        })
    }

    /// Returns the firmware that libvirt will select for the domain, or the reason why it is not known.
    pub(crate) fn firmware_to_select(&self, params: &DomainXmlParams) -> Result<AarchFirmware, String> {
        let xml = without_disks(&domain_xml(params));
        let converted = self.daemon.connect.domain_xml_to_native("qemu-argv", &xml, 0);
        let arguments = converted.map_err(|error| format!("libvirt does not name its firmware: {error}"))?;
        let code = code_of(&arguments).ok_or("libvirt does not name the code of its firmware")?;
        let arch = params.spec.architecture;
        firmware::with_code(&code, arch, Path::new("/"))
            .ok_or_else(|| format!("no descriptor of this host names the firmware {}", code.display()))
    }

    /// Writes the memory of the domain's machine to a file, and ends the machine. QEMU has then written the guest's disk.
    pub(crate) fn save_memory(&self, machine: &mut Machine, path: &Path) -> Result<()> {
        machine.domain.suspend().context("stop the guest's processors")?;
        let file = File::options().write(true).create_new(true).mode(0o600).open(path);
        let mut file = file.with_context(|| format!("make {}", path.display()))?;
        let (mut reader, writer) = std::io::pipe().context("make a pipe")?;
        let copied = std::thread::spawn(move || std::io::copy(&mut reader, &mut file));
        give_end(machine, writer)?;
        // Without this, QEMU 7.2 sends 128 MiB per second.
        machine.qmp("migrate-set-parameters", &json!({ "max-bandwidth": i64::MAX }))?;
        machine.qmp("migrate", &json!({ "uri": format!("fd:{PIPE}") }))?;
        let saved = self.wait_for_memory(machine, "saving the machine's memory");
        machine.destroy()?;
        let copied = copied.join().map_err(|_panic| anyhow!("the copy of the memory panicked"))?;
        // If this host's disk is full, QEMU only notices that the pipe has broken.
        copied.with_context(|| format!("write the machine's memory to {}", path.display()))?;
        saved
    }

    /// Loads the memory of a saved machine into a domain that waits for it. The guest's processors stay stopped.
    ///
    /// # Errors
    /// Returns an error if QEMU does not accept the memory. QEMU then ends.
    pub(crate) fn load_memory(&self, machine: &Machine, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let (reader, writer) = std::io::pipe().context("make a pipe")?;
        feed(file, writer);
        give_end(machine, reader)?;
        machine.qmp("migrate-incoming", &json!({ "uri": format!("fd:{PIPE}") }))?;
        self.wait_for_memory(machine, "restoring the machine's memory")
    }

    /// Waits until QEMU has written or read the memory.
    fn wait_for_memory(&self, machine: &Machine, what: &str) -> Result<()> {
        let (begun, limit) = (Instant::now(), self.ui.scaled(limits::MEMORY));
        loop {
            self.ui.tick(what)?;
            if machine.condition() == Condition::Gone {
                bail!(
                    "{what}: QEMU ended; its log in /var/log/libvirt/qemu or ~/.cache/libvirt/qemu/log has the reason"
                );
            }
            let state = machine.qmp("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    bail!(
                        "{what}: QEMU failed: {}",
                        state["error-desc"].as_str().unwrap_or("it names no reason")
                    )
                }
                _ if begun.elapsed() > limit => {
                    bail!("{what}: QEMU has not finished within {} s: {state}", limit.as_secs())
                }
                _ => std::thread::sleep(limits::POLL),
            }
        }
    }

    /// Copies the disk of the machine, which is off, to a file on this host.
    pub(crate) fn download_disk(&self, path: &Path) -> Result<()> {
        let [name, ..] = &self.volume_names();
        let copied = || -> Result<()> {
            let volume = self.daemon.volume(&self.pool, name)?.context("it does not exist")?;
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            let stream = Stream::new(&self.daemon.connect, 0).context("open a stream")?;
            // A length of 0 stands for the whole volume.
            volume.download(&stream, 0, 0, 0)?;
            let mut buffer = vec![0; 256 << 10];
            loop {
                self.ui.tick("saving the machine's disk")?;
                match usize::try_from(stream.recv(&mut buffer)?)? {
                    0 => break,
                    count => file.write_all(&buffer[..count])?,
                }
            }
            Ok(stream.finish()?)
        };
        copied().with_context(|| format!("download the volume {name}"))
    }
}

/// Passes one end of a pipe on to QEMU, and closes it here. The other end then notices the end of QEMU.
fn give_end(machine: &Machine, end: impl AsFd) -> Result<()> {
    give(&machine.domain, &end).map(drop).context("pass a pipe on to QEMU")
}

/// Writes a file into a pipe. If the file cannot be read, the pipe ends early, and QEMU does not accept the memory.
fn feed(mut file: File, mut writer: PipeWriter) {
    std::thread::spawn(move || drop(std::io::copy(&mut file, &mut writer)));
}

/// Returns the path of the firmware's code in QEMU's arguments, as libvirt writes them for a shell.
fn code_of(arguments: &str) -> Option<PathBuf> {
    arguments.split('\'').filter_map(|word| serde_json::from_str::<Value>(word).ok()).find_map(|device| {
        let is_code = device["node-name"] == CODE;
        device["filename"].as_str().filter(|_| is_code).map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;

    use virt::connect::Connect;
    use xtask_core::cache::Cache;
    use xtask_core::runs::RunDir;
    use xtask_core::runs::owner::Owner;
    use xtask_jobs::Ui;

    use super::super::Daemon;
    use super::*;

    /// libvirt's mock driver passes no files on.
    #[test]
    fn a_libvirt_that_passes_no_files_on_has_no_snapshots() {
        let directory = tempfile::tempdir().unwrap();
        let (run, _) = RunDir::create(&Cache::at(directory.path()), || Ok(())).unwrap();
        let connect = ManuallyDrop::new(Connect::open(Some("test:///default")).unwrap());
        let domain = connect.lookup_domain_by_name("test").unwrap();
        let daemon = Daemon { connect, uri: "test:///default".parse().unwrap() };
        let mut run_domain = RunDomain::new(daemon, Owner::of(&run).unwrap(), "default-pool", &Ui::quiet());
        assert!(run_domain.against_snapshots().is_err(), "the domain is not defined");
        run_domain.domain = Some(domain);
        let reason = run_domain.against_snapshots().unwrap().unwrap();
        assert!(reason.contains("passes no files on to QEMU"), "{reason}");
    }

    #[test]
    fn the_firmware_is_found_among_qemus_arguments() {
        let arguments = r#"LC_ALL=C /usr/bin/qemu-system-aarch64 -name guest=vm -blockdev '{"driver":"file","filename":"/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true}' -blockdev '{"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}' -blockdev '{"driver":"file","filename":"/nvram","node-name":"libvirt-pflash1-storage"}' -machine virt"#;
        assert_eq!(code_of(arguments).unwrap(), Path::new("/usr/share/AAVMF/AAVMF_CODE.no-secboot.fd"));
        assert_eq!(code_of("/usr/bin/qemu-system-x86_64 -name 'guest=vm'"), None);
    }
}
