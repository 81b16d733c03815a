//! A container image as the subject: its files are the file system, and its entry point is the program. The files of
//! the unpacked image are found only through [`resolve`], because its links can lead to files of this host.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Error, Result};
use xtask_archives::{ImageConfig, Kind, PATH, Request, Unpacked, resolve};
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::TryArgs;
use xtask_core::error::{self, Failure};
use xtask_core::format::human_bytes;
use xtask_jobs::Ui;

use crate::accounts::Account;
use crate::root::missing;
use crate::subject::{Core, Runner, Subject, runner};

/// Unpacks an archive into a directory. The archive is a container image for the device or a tar archive.
///
/// # Errors
/// Returns a usage error if the archive is damaged, exceeds a limit or is for another architecture, and a failure of
/// the host if its files cannot be written.
pub(crate) fn unpack(archive: &Path, into: &Path, core: Core<'_>, ui: &Ui) -> Result<Unpacked> {
    let request = Request { arch: Some(core.arch), ..Request::default() };
    let mut progress =
        |read, total| ui.tick(&format!("{} of {} are unpacked", human_bytes(read), human_bytes(total)));
    let unpacked = xtask_archives::unpack(archive, into, &request, &mut progress).map_err(of_user)?;
    if let Some(image) = &unpacked.image {
        check_platform(archive, &image.config, core)?;
    }
    Ok(unpacked)
}

/// Turns an error about the archive's content into a usage error, so that it is not mistaken for an exit code of the
/// program. The failures of the host stay what they are.
pub(crate) fn of_user(mut error: Error) -> Error {
    if let Some(failure) = error.downcast_mut::<Failure>()
        && failure.kind == error::Kind::Guest
    {
        failure.kind = error::Kind::Usage;
    }
    error
}

fn check_platform(archive: &Path, config: &ImageConfig, Core { arch, device }: Core<'_>) -> Result<()> {
    // Debian and Go have the same names for these architectures.
    let wanted = arch.profile().debian_arch;
    if (config.os.as_str(), config.architecture.as_str()) == ("linux", wanted) {
        return Ok(());
    }
    let ImageConfig { os, architecture, .. } = config;
    let other = VmArchitecture::ALL.into_iter().find(|one| one.profile().debian_arch == architecture);
    let other = other.filter(|_| os == "linux").and_then(crate::subject::default_device);
    let other = other.map_or(String::new(), |name| format!(", or try it with --device {name}"));
    let message = format!(
        "try {}: the image is for {os}/{architecture}, and {device} is linux/{wanted}; \
         save the image of this platform{other}",
        archive.display()
    );
    Err(Failure::usage(message).into())
}

/// An unpacked image.
pub(crate) struct Container<'a> {
    pub(crate) archive: &'a Path,
    pub(crate) root: &'a Path,
    pub(crate) config: ImageConfig,
}

impl Container<'_> {
    /// Returns how to run the image's program without the arguments of the command line, or a sentence if a file that
    /// it needs is missing in the image. The arguments of the command line replace the image's command.
    ///
    /// # Errors
    /// Returns a usage error if the image has no program, if its program is not one for the device, or if its user or
    /// its working directory is not valid.
    pub(crate) fn subject(mut self, args: &TryArgs, core: Core<'_>) -> Result<Result<Subject, String>> {
        if !args.arguments.is_empty() {
            self.config.cmd.clear();
        }
        let arguments = self.config.command().map(|word| word.as_bytes().to_vec()).collect();
        if self.config.entrypoint.is_empty() && self.config.cmd.is_empty() {
            self.config.cmd.extend(args.arguments.first().map(|word| word.to_string_lossy().into_owned()));
        }
        let Some(first) = self.config.command().next().map(str::to_owned) else {
            return Err(self.refuse("the image has neither an entrypoint nor a command; name one after --"));
        };
        let directory = self.working_directory()?;
        let found = self.config.program(self.root)?;
        let Some(file) = found.files.first() else {
            return Ok(Err(format!(
                "the entry point {first} is no executable file of {}",
                self.archive.display()
            )));
        };
        if let Some(interpreter) = &found.missing {
            return Ok(Err(missing(interpreter, "the interpreter", &self.archive.display().to_string())));
        }
        if let Some(missing) = self.missing_loader(&found.files, core)? {
            return Ok(Err(missing));
        }
        let account = Account::of(&self.config.user, self.root).map_err(|why| self.refuse(&why))?;
        let subject = Subject {
            share: None,
            program: self.path_of(&first, &directory, file),
            directory: directory.as_os_str().as_bytes().to_vec(),
            runner: self.runner(file, core)?,
            environment: self.environment(&account),
            arguments,
            user: account.user,
        };
        let fields = subject.environment.iter().chain(&subject.arguments).chain([&subject.directory]);
        if fields.into_iter().any(|field| field.contains(&0)) {
            return Err(self.refuse("its configuration contains a zero byte"));
        }
        Ok(Ok(subject))
    }

    fn refuse(&self, why: &str) -> Error {
        Failure::usage(format!("try {}: {why}", self.archive.display())).into()
    }

    /// Returns the absolute path of the working directory, which may be missing.
    fn working_directory(&self) -> Result<PathBuf> {
        let directory = Path::new("/").join(&self.config.working_directory);
        let is_directory = match resolve(self.root, &directory) {
            Ok(Some(found)) => self.root.join(found).is_dir(),
            Ok(None) => true,
            Err(_) => false,
        };
        if is_directory {
            return Ok(directory);
        }
        Err(self.refuse(&format!("its working directory {} is no directory", directory.display())))
    }

    fn runner(&self, file: &Path, core: Core<'_>) -> Result<Option<Runner>> {
        let why = |why: String| self.refuse(&format!("/{}: {why}", file.display()));
        runner(&self.root.join(file), core).map_err(why)
    }

    /// Returns a sentence if the dynamic loader of the last file is missing, which is no script.
    fn missing_loader(&self, files: &[PathBuf], core: Core<'_>) -> Result<Option<String>> {
        let Some(Runner { file, what }) =
            files.last().map(|file| self.runner(file, core)).transpose()?.flatten()
        else {
            return Ok(None);
        };
        Ok(file_in(self.root, &file)
            .is_none()
            .then(|| missing(&file, what, &self.archive.display().to_string())))
    }

    /// Returns the path under which a container starts the command, which is not the path without links: a program may
    /// look for its files beside the link.
    fn path_of(&self, command: &str, directory: &Path, file: &Path) -> PathBuf {
        if command.contains('/') {
            return directory.join(command);
        }
        let path = self.config.env.iter().find_map(|variable| variable.strip_prefix("PATH="));
        let places = path.unwrap_or(PATH).split(':').map(|entry| directory.join(entry).join(command));
        let leads_there = |place: &PathBuf| resolve(self.root, place).ok().flatten().as_deref() == Some(file);
        places.into_iter().find(leads_there).unwrap_or_else(|| Path::new("/").join(file))
    }

    fn environment(&self, account: &Account) -> Vec<Vec<u8>> {
        let is_set = |name: &str| {
            self.config.env.iter().any(|own| own.split_once('=').is_some_and(|(own, _)| own == name))
        };
        let defaults = [("PATH", PATH), ("HOME", account.home.as_str())];
        let defaults = defaults.into_iter().filter(|(name, _)| !is_set(name));
        let defaults = defaults.map(|(name, value)| format!("{name}={value}"));
        defaults.chain(self.config.env.iter().cloned()).map(String::into_bytes).collect()
    }
}

/// Returns the regular file at a path of an unpacked tree.
pub(crate) fn file_in(root: &Path, path: &str) -> Option<PathBuf> {
    let found = resolve(root, Path::new(path)).ok().flatten().map(|found| root.join(found));
    found.filter(|found| found.is_file())
}

/// Returns whether an archive of this kind is a container image.
pub(crate) fn is_image(kind: Kind) -> bool {
    matches!(kind, Kind::DockerArchive | Kind::OciArchive | Kind::OciLayout)
}

/// Returns the kind of the archive at a path; `None` if it is no archive.
pub(crate) fn kind_of(path: &Path) -> Result<Option<Kind>> {
    Kind::of(path).map_err(of_user).with_context(|| format!("try {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;
    use xtask_core::cli::{Cli, Command};
    use xtask_core::digest::Algorithm;

    use super::*;

    const PI5: Core<'_> = Core { arch: VmArchitecture::Aarch64, device: "pi5" };
    const SHELL: &str = "\x7fELF";

    /// The flags of `try IMAGE -- ARGUMENTS`.
    fn args(arguments: &[&str]) -> TryArgs {
        let words = ["xtask", "try", "--env", "ADDED=1", "image", "--"];
        let Command::Try(args) = Cli::parse_from(words.iter().chain(arguments)).command else {
            panic!("another command")
        };
        args
    }

    fn config(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
        let words = |all: &[&str]| all.iter().map(|word| (*word).to_owned()).collect();
        ImageConfig {
            architecture: "arm64".to_owned(),
            os: "linux".to_owned(),
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            ..ImageConfig::default()
        }
    }

    /// A tree with a program, a script that leads to it, and a program of another architecture.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.put("usr/bin/dash", &elf(183));
            tree.put("usr/bin/foreign", &elf(62));
            tree.put("srv/start", b"#!/bin/sh\n");
            tree.put("srv/orphan", b"#!/bin/python3\n");
            // On this host, these links would lead to the host's own files.
            std::os::unix::fs::symlink("/usr/bin", tree.0.path().join("bin")).unwrap();
            std::os::unix::fs::symlink("/usr/bin/dash", tree.0.path().join("usr/bin/sh")).unwrap();
            tree
        }

        fn put(&self, name: &str, bytes: &[u8]) {
            let path = self.0.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn subject(&self, config: ImageConfig, arguments: &[&str]) -> Result<Result<Subject, String>> {
            let args = args(arguments);
            let container = Container { archive: Path::new("image"), root: self.0.path(), config };
            Ok(container.subject(&args, PI5)?.map(|subject| subject.given(&args)))
        }
    }

    fn elf(machine: u8) -> Vec<u8> {
        let mut bytes = SHELL.as_bytes().to_vec();
        bytes.resize(64, 0);
        (bytes[4], bytes[5], bytes[16], bytes[18]) = (2, 1, 2, machine);
        bytes
    }

    fn words(all: &[Vec<u8>]) -> Vec<&str> {
        all.iter().map(|word| std::str::from_utf8(word).unwrap()).collect()
    }

    #[test]
    fn arguments_replace_the_command_but_not_the_entry_point() {
        let tree = Tree::new();
        type Words = &'static [&'static str];
        let table: [(Words, Words, Words, &str, Words); 6] = [
            (&["/bin/sh"], &["-c", "true"], &[], "/bin/sh", &["/bin/sh", "-c", "true"]),
            (&["/bin/sh"], &["-c", "true"], &["-e", "x y"], "/bin/sh", &["/bin/sh", "-e", "x y"]),
            (&[], &["sh", "-c"], &[], "/usr/bin/sh", &["sh", "-c"]),
            (&[], &["sh", "-c"], &["dash"], "/usr/bin/dash", &["dash"]),
            (&[], &[], &["dash"], "/usr/bin/dash", &["dash"]),
            (&["./start"], &[], &[], "/srv/./start", &["./start"]),
        ];
        for (entrypoint, cmd, arguments, program, expected) in table {
            let config = ImageConfig { working_directory: "/srv".to_owned(), ..config(entrypoint, cmd) };
            let subject = tree.subject(config, arguments).unwrap().unwrap();
            assert_eq!(
                (subject.program.to_str().unwrap(), words(&subject.arguments)),
                (program, expected.to_vec())
            );
            assert_eq!(subject.directory, b"/srv");
        }
        let error = tree.subject(config(&[], &[]), &[]).unwrap_err();
        assert_eq!(error::code(&error), 2);
        assert!(error.to_string().contains("neither an entrypoint nor a command"), "{error}");
    }

    #[test]
    fn the_environment_is_that_of_the_image() {
        let tree = Tree::new();
        let of = |env: &[&str]| {
            let env = env.iter().map(|variable| (*variable).to_owned()).collect();
            let config = ImageConfig { env, ..config(&["/bin/sh"], &[]) };
            let subject = tree.subject(config, &[]).unwrap().unwrap();
            words(&subject.environment).join(" ")
        };
        assert_eq!(of(&[]), format!("PATH={PATH} HOME=/root ADDED=1"));
        assert_eq!(of(&["HOME=/h", "A=b=c"]), format!("PATH={PATH} HOME=/h A=b=c ADDED=1"));
        assert_eq!(of(&["PATH=/bin"]), "HOME=/root PATH=/bin ADDED=1");
        let error =
            tree.subject(ImageConfig { env: vec!["A=\0".to_owned()], ..config(&["/bin/sh"], &[]) }, &[]);
        assert!(error.unwrap_err().to_string().contains("zero byte"));
    }

    #[test]
    fn what_the_program_lacks_is_named() {
        let tree = Tree::new();
        let sentence = |entrypoint: &str| tree.subject(config(&[entrypoint], &[]), &[]).unwrap().unwrap_err();
        assert_eq!(sentence("/bin/app"), "the entry point /bin/app is no executable file of image");
        assert_eq!(sentence("app"), "the entry point app is no executable file of image");
        assert_eq!(
            sentence("/srv/orphan"),
            "the program needs the interpreter /bin/python3, and image does not have it"
        );
        let error = |config: ImageConfig| {
            let error = tree.subject(config, &[]).unwrap_err();
            assert_eq!(error::code(&error), 2, "{error:#}");
            error.to_string()
        };
        assert!(
            error(config(&["foreign"], &[]))
                .contains("/usr/bin/foreign: it is for x86_64, and pi5 is aarch64")
        );
        let user = ImageConfig { user: "app".to_owned(), ..config(&["sh"], &[]) };
        assert!(error(user).contains("its user is app, which its /etc/passwd does not have"));
        let directory = ImageConfig { working_directory: "/srv/start/x".to_owned(), ..config(&["sh"], &[]) };
        assert!(error(directory).contains("its working directory /srv/start/x is no directory"));
    }

    /// Makes the archive of `docker save` for an image without files.
    fn docker(architecture: &str) -> Vec<u8> {
        let layer = tar::Builder::new(Vec::new()).into_inner().unwrap();
        let digest = Algorithm::Sha256.of(&layer).to_string();
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest] },
        });
        let manifest = serde_json::json!([{ "Config": "c.json", "RepoTags": null, "Layers": ["l.tar"] }]);
        let mut archive = tar::Builder::new(Vec::new());
        let (config, manifest) = (config.to_string(), manifest.to_string());
        for (name, content) in
            [("c.json", config.as_bytes()), ("manifest.json", manifest.as_bytes()), ("l.tar", &layer)]
        {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, name, content).unwrap();
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn an_image_for_another_architecture_and_a_damaged_one_are_usage_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let unpacked = |name: &str, bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            unpack(&path, &directory.path().join(name), PI5, &Ui::quiet())
        };
        assert_eq!(unpacked("own", &docker("arm64")).unwrap().kind, Kind::DockerArchive);
        let table = [
            (
                docker("amd64"),
                "the image is for linux/amd64, and pi5 is linux/arm64; save the image of this platform, or try it with --device max-x86",
            ),
            (
                docker("riscv64"),
                "the image is for linux/riscv64, and pi5 is linux/arm64; save the image of this platform",
            ),
        ];
        for (at, (bytes, expected)) in table.into_iter().enumerate() {
            let error = unpacked(&at.to_string(), &bytes).unwrap_err();
            assert_eq!(error::code(&error), 2, "{error:#}");
            assert!(error.to_string().ends_with(expected), "{error}");
        }
        let mut damaged = docker("arm64");
        damaged.truncate(damaged.len() - 2000);
        let error = unpacked("damaged", &damaged).unwrap_err();
        assert_eq!(error::code(&error), 2, "{error:#}");
    }
}
