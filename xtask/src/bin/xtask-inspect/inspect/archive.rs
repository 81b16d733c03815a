//! Adds the files of archives. The files of a container image find their libraries in the image. Those of a package
//! find them in the package, and then in the target's image or sysroot.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use inspect::finding::{Finding, Report, Severity};
use xtask_archives::{Image, ImageConfig, Kind, PATH, Program, Request, Unpacked, resolve, unpack};
use xtask_core::arch::VmArchitecture;
use xtask_core::cache::Cache;
use xtask_core::cli::InspectArgs;
use xtask_core::error::{self, Failure};
use xtask_core::format::human_bytes;
use xtask_core::runs::RunDir;
use xtask_inspection::{Inspection, arch_of_file, requested_arch};
use xtask_jobs::{Step, Ui};

use super::collection::{Collection, Content};

/// Unpacks archives into the directory of a run, which is made for the first archive.
pub(super) struct Unpacker<'a> {
    ui: &'a Ui,
    run: Option<(Cache, RunDir)>,
    count: usize,
}

impl<'a> Unpacker<'a> {
    pub(super) fn new(ui: &'a Ui) -> Self {
        Self { ui, run: None, count: 0 }
    }

    fn unpack(&mut self, path: &Path, kind: Kind, arch: Option<VmArchitecture>) -> Result<Unpacked> {
        if self.run.is_none() {
            let cache = Cache::open()?;
            let (run, collected) = RunDir::create(&cache, || self.ui.check()).map_err(of_host)?;
            collected.iter().for_each(|dead| self.ui.note(&dead.to_string()));
            self.run = Some((cache, run));
        }
        let Some((cache, run)) = &self.run else { unreachable!("it was just made") };
        self.count += 1;
        let into = run.work().join(format!("archive-{}", self.count));
        let request = Request { kind: Some(kind), arch, ..Request::default() };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let step = Step { kind: "inspect", what: &format!("unpack {name}"), title: "unpack" };
        self.ui.step(cache, step, || {
            let mut progress = |read: u64, total: u64| {
                self.ui.tick(&format!("{name}: {} of {}", human_bytes(read), human_bytes(total)))
            };
            let unpacked = unpack(path, &into, &request, &mut progress)?;
            Ok((unpacked, format!("{}: {kind}", path.display())))
        })
    }

    /// Deletes what was unpacked.
    pub(super) fn discard(self) -> Result<()> {
        self.run.map_or(Ok(()), |(_, run)| run.discard(|| Ok(())))
    }
}

/// Returns the error for a cache that cannot be written. It is no fault of the archive.
fn of_host(error: anyhow::Error) -> anyhow::Error {
    if error::failure(&error).is_some() {
        return error;
    }
    let remedy = "make the cache writable, or set IOT_XTASK_CACHE to another directory";
    error.context(Failure::host("make a directory in the cache to unpack archives", remedy))
}

/// Unpacks an archive and adds its files.
pub(super) fn add_archive(
    collection: &mut Collection,
    path: &Path,
    kind: Kind,
    args: &InspectArgs,
    unpacker: &mut Unpacker<'_>,
) -> Result<()> {
    if kind.is_image() && (args.image.is_some() || args.sysroot.is_some()) {
        let message = format!(
            "inspect {}: a container image has its own files; leave out --image and --sysroot",
            path.display()
        );
        return Err(Failure::usage(message).into());
    }
    let mut unpacked = unpacker.unpack(path, kind, requested_arch(args))?;
    // The path of a candidate has no links, and must begin with the root.
    unpacked.root = unpacked.root.canonicalize()?;
    match &unpacked.image {
        Some(image) => add_image(collection, path, image, &unpacked, args),
        None => add_package(collection, path, &unpacked, args),
    }
}

fn add_package(
    collection: &mut Collection,
    path: &Path,
    unpacked: &Unpacked,
    args: &InspectArgs,
) -> Result<()> {
    let mut judges = Vec::new();
    for (name, candidate) in collection.walk(&unpacked.root, &[]) {
        if candidate.is_elf() {
            let place = |inspection: Inspection| {
                let inspection = inspection.with_package(&unpacked.root);
                if unpacked.kind == Kind::Apk { inspection.with_musl() } else { inspection }
            };
            let judge = collection.judge_for(&mut judges, args, &candidate, place)?;
            collection.push(shown(path, &unpacked.root, &name), candidate, judge);
        }
    }
    Ok(())
}

fn add_image(
    collection: &mut Collection,
    path: &Path,
    image: &Image,
    unpacked: &Unpacked,
    args: &InspectArgs,
) -> Result<()> {
    let (config, root) = (&image.config, &unpacked.root);
    let arch = arch_of_image(path, config, args)?;
    let args = InspectArgs { arch: Some(arch), sysroot: Some(root.clone()), ..args.clone() };
    let directories = list(config, "LD_LIBRARY_PATH").filter(|part| part.starts_with('/'));
    let inspection = Inspection::from_args(&args)?.with_library_path(directories);
    let inspection = inspection.with_label(path.display().to_string());
    let preloaded = preloaded(config, root, &inspection);
    let judge = collection.add_judge(inspection);
    let program = config.program(root)?;
    let started: Vec<PathBuf> = program.files.iter().map(|file| root.join(file)).collect();
    let layers = unpacked.layers_by_file();
    let files = collection.walk(root, &started);
    // If an image has no file for its own architecture, its files are for the wrong one, and they are refused.
    let is_mixed = files.iter().any(|(_, candidate)| arch_of_file(&candidate.start) == Some(arch));
    let commands = command_directories(config, root);
    for (name, candidate) in files {
        let inner = candidate.path.strip_prefix(root).unwrap_or(&candidate.path).to_owned();
        let name = shown(path, root, &name);
        let subject = if candidate.is_elf() {
            collection.push(name, candidate, judge)
        } else if let Some(missing) = config.missing_interpreter(root, &inner)? {
            collection.push_subject(name, Content::Judged(script(&missing)), judge)
        } else {
            continue;
        };
        subject.container = Some(path.display().to_string());
        subject.layer = layers.get(&*inner).map(|layer| layer.created_by.clone());
        subject.is_entrypoint = program.files.contains(&inner);
        if is_mixed && !subject.is_entrypoint {
            let is_command = inner.parent().is_some_and(|parent| commands.contains(parent));
            subject.foreign = if is_command { Severity::Warned } else { Severity::Informs };
        }
        if subject.is_entrypoint {
            subject.preloaded.clone_from(&preloaded);
        }
    }
    if let Some(report) = entrypoint(config, &program) {
        let subject = collection.push_subject(path.display().to_string(), Content::Judged(report), judge);
        subject.container = Some(path.display().to_string());
        subject.is_entrypoint = true;
    }
    Ok(())
}

/// Returns the directories in which an image's scripts look for commands, relative to the root and without links.
fn command_directories(config: &ImageConfig, root: &Path) -> BTreeSet<PathBuf> {
    let path = config.env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH);
    path.split(':').filter_map(|directory| resolve(root, Path::new(directory)).ok().flatten()).collect()
}

/// Returns the finding about a script whose interpreter is missing. It is a fact, because images contain many scripts
/// that nothing starts there, such as examples.
fn script(missing: &str) -> Report {
    let found = format!("it is a script for {missing}, which is not in the image or is not executable");
    Report::new(vec![Finding::informs("script", found)])
}

/// Returns the finding about the command of a container, if it cannot start.
fn entrypoint(config: &ImageConfig, program: &Program) -> Option<Report> {
    let command = config.command().collect::<Vec<_>>().join(" ");
    if program.is_no_program {
        let file = program.files.last().map(|file| file.display().to_string()).unwrap_or_default();
        let found = format!(
            "a container starts `{command}`, and Linux does not execute /{file} (\"exec format error\"): it is neither an \
             executable nor a script with an interpreter"
        );
        let remedy = "let the script begin with a line such as #!/bin/sh, or give the executable";
        return Some(Report::new(vec![Finding::refused("container-command", &found, "", remedy)]));
    }
    // A carriage return would not be seen.
    let missing = program.missing.as_ref()?.replace('\r', "\\r");
    let found = match program.files.last() {
        None => format!("a container starts `{command}`, and {missing} is not there or is not executable"),
        Some(script) => format!(
            "a container starts `{command}`; the script /{} needs {missing}, which is not there or is not executable",
            script.display()
        ),
    };
    let remedy = if missing.ends_with("\\r") {
        "save the script with the line ends of Unix, for example with dos2unix"
    } else {
        "add the program to the image, or correct ENTRYPOINT, CMD or the first line of the script"
    };
    Some(Report::new(vec![Finding::refused("container-command", &found, "", remedy)]))
}

/// Returns the libraries that the environment of an image adds to its programs (`LD_PRELOAD`): their paths in the image
/// and on this host. A name without a slash is searched like any library.
fn preloaded(config: &ImageConfig, root: &Path, inspection: &Inspection) -> Vec<(String, PathBuf)> {
    let place = |path: &str| {
        let place = root.join(resolve(root, Path::new(path)).ok()??);
        place.is_file().then(|| (path.to_owned(), place))
    };
    let libraries = list(config, "LD_PRELOAD").filter(|name| name.starts_with('/') || !name.contains('/'));
    let found = libraries.filter_map(|name| match name.contains('/') {
        true => place(&name),
        false => inspection.library_directories().find_map(|directory| place(&format!("{directory}/{name}"))),
    });
    found.collect()
}

/// Returns the parts of a variable of an image's environment. Colons, semicolons and spaces separate them (ld.so(8)). A
/// relative path depends on the working directory, so callers leave it out.
fn list<'a>(config: &'a ImageConfig, variable: &str) -> impl Iterator<Item = String> + use<'a> {
    let start = format!("{variable}=");
    let value = config.env.iter().find_map(move |entry| entry.strip_prefix(&start)).unwrap_or_default();
    value.split([':', ' ', ';']).filter(|part| !part.is_empty()).map(str::to_owned)
}

/// Returns the architecture with which an image is compared: that of the flags, or the image's own.
fn arch_of_image(path: &Path, config: &ImageConfig, args: &InspectArgs) -> Result<VmArchitecture, Failure> {
    requested_arch(args).or_else(|| config.arch()).ok_or_else(|| {
        Failure::usage(format!(
            "inspect {}: the image is for {}/{}, which is no architecture of a device here; name one with --arch",
            path.display(),
            config.os,
            config.architecture
        ))
    })
}

/// Returns the name of an unpacked file for the user: the archive's path with the path in the archive.
fn shown(archive: &Path, root: &Path, name: &str) -> String {
    let inner = name.strip_prefix(&*root.to_string_lossy()).unwrap_or(name);
    format!("{}{inner}", archive.display())
}
