//! Finds the files to judge: those that were named, the ELF files in directories, and the files of archives.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use inspect::finding::{Finding, Report, Severity};
use xtask_archives::Kind;
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::InspectArgs;
use xtask_core::error::{self, Failure};
use xtask_core::output::clean;
use xtask_inspection::{Inspection, Judge, arch_of_file};

use super::archive::{Unpacker, add_archive};
use super::candidate::Candidate;

/// A file to judge.
pub(super) struct Subject {
    /// The file's name for the user: its path or, in an archive, the archive's path with the path in the archive.
    pub(super) name: String,
    pub(super) content: Content,
    /// The index of the judge.
    pub(super) judge: usize,
    /// The container image that the file is in.
    pub(super) container: Option<String>,
    /// The command that made the layer of the image with this file.
    pub(super) layer: Option<String>,
    /// True if a container of the image starts this file.
    pub(super) is_entrypoint: bool,
    /// The severity of a header for another machine or another system. Images contain such files, for example prebuilt
    /// modules for other platforms, which no program loads.
    pub(super) foreign: Severity,
    /// The libraries that the environment of a container image adds to its programs (`LD_PRELOAD`): their paths in the
    /// image and on this host.
    pub(super) preloaded: Vec<(String, PathBuf)>,
}

impl Subject {
    /// Returns a subject that is in no container image.
    pub(super) fn new(name: String, content: Content, judge: usize) -> Self {
        let (container, layer, is_entrypoint, preloaded) = Default::default();
        let foreign = Severity::Refused;
        Self { name, content, judge, container, layer, is_entrypoint, foreign, preloaded }
    }

    /// Returns the size of an ELF file.
    pub(super) fn bytes(&self) -> Option<u64> {
        match &self.content {
            Content::File(candidate) => Some(candidate.bytes),
            Content::Judged(_) => None,
        }
    }
}

pub(super) enum Content {
    File(Candidate),
    /// The file is already judged, and is no ELF file.
    Judged(Report),
}

/// The indices of the judges for the files of one place, by architecture.
pub(super) type Judges = Vec<(Option<VmArchitecture>, usize)>;

/// The files to judge, and a record of the files that are not judged.
#[derive(Default)]
pub(super) struct Collection {
    pub(super) subjects: Vec<Subject>,
    pub(super) judges: Vec<Judge>,
    /// The number of relocatable files and core dumps.
    pub(super) objects: usize,
    /// The files and directories that could not be read, with the reason.
    pub(super) unreadable: Vec<String>,
    /// True if exactly one file was named, and is no archive.
    pub(super) is_single: bool,
}

impl Collection {
    /// Finds the files that the flags name. Archives are unpacked with `unpacker`.
    ///
    /// # Errors
    /// Returns a usage error for a path that cannot be read, and if there is nothing to judge.
    pub(super) fn of(args: &InspectArgs, unpacker: &mut Unpacker<'_>) -> Result<Self> {
        let (mut collection, mut judges) = (Self::default(), Vec::new());
        for path in &args.paths {
            collection.add(path, args, &mut judges, unpacker)?;
        }
        if collection.subjects.is_empty() && collection.unreadable.is_empty() {
            let paths: Vec<_> = args.paths.iter().map(|path| path.display().to_string()).collect();
            let message = format!(
                "inspect {}: there is no executable and no library; name a file, or a directory that contains some",
                paths.join(" ")
            );
            return Err(Failure::usage(message).into());
        }
        Ok(collection)
    }

    /// Returns the collection of one executable, the agent.
    pub(super) fn of_agent(path: &Path, inspection: Inspection) -> Result<Self> {
        let mut collection = Self { is_single: true, ..Self::default() };
        let judge = collection.add_judge(inspection);
        collection.push(path.display().to_string(), Candidate::at(path)?, judge);
        Ok(collection)
    }

    fn add(
        &mut self,
        path: &Path,
        args: &InspectArgs,
        judges: &mut Judges,
        unpacker: &mut Unpacker<'_>,
    ) -> Result<()> {
        let failed = |error| Failure::usage(format!("inspect {}: {error}", path.display()));
        if std::fs::metadata(path).map_err(failed)?.is_dir() {
            if let Some(kind) = Kind::of(path)? {
                return self.add_archive(path, kind, args, unpacker);
            }
            for (name, candidate) in self.walk(path, &[]) {
                if candidate.is_elf() {
                    let judge = self.judge_for(judges, args, &candidate, |inspection| inspection)?;
                    self.push(name, candidate, judge);
                }
            }
            return Ok(());
        }
        let candidate = Candidate::at(path)?;
        if !candidate.is_elf() {
            match Kind::of(path) {
                Ok(Some(kind)) => return self.add_archive(path, kind, args, unpacker),
                Ok(None) => {}
                Err(error) => return self.add_refused(path, args, error),
            }
        }
        self.is_single = args.paths.len() == 1;
        let judge = self.judge_for(judges, args, &candidate, |inspection| inspection)?;
        self.push(path.display().to_string(), candidate, judge);
        Ok(())
    }

    fn add_archive(
        &mut self,
        path: &Path,
        kind: Kind,
        args: &InspectArgs,
        unpacker: &mut Unpacker<'_>,
    ) -> Result<()> {
        match add_archive(self, path, kind, args, unpacker) {
            Err(error) => self.add_refused(path, args, error),
            added => added,
        }
    }

    /// Adds a finding about an archive that is damaged, exceeds a limit, or has no image for the architecture, so that
    /// the other paths are judged. Other errors are returned.
    fn add_refused(&mut self, path: &Path, args: &InspectArgs, error: Error) -> Result<()> {
        if !error::Kind::Guest.is(&error) {
            return Err(error);
        }
        let found = format!("it cannot be read: {}", clean(&format!("{error:#}")));
        let remedy = error::hint(&error).unwrap_or_default();
        let report = Report::new(vec![Finding::refused("archive", &found, "", remedy)]);
        let judge = self.add_judge(Inspection::from_args(args)?);
        self.push_subject(clean(&path.to_string_lossy()), Content::Judged(report), judge);
        Ok(())
    }

    pub(super) fn push(&mut self, name: String, candidate: Candidate, judge: usize) -> &mut Subject {
        self.push_subject(name, Content::File(candidate), judge)
    }

    pub(super) fn push_subject(&mut self, name: String, content: Content, judge: usize) -> &mut Subject {
        self.subjects.push(Subject::new(name, content, judge));
        self.subjects.last_mut().expect("it was just added")
    }

    /// Returns the judge for a file. Without a flag, the file's own architecture decides. `judges` has the judges for
    /// the files of the same place, and `place` adds the place to the target of a new one.
    pub(super) fn judge_for(
        &mut self,
        judges: &mut Judges,
        args: &InspectArgs,
        candidate: &Candidate,
        place: impl Fn(Inspection) -> Inspection,
    ) -> Result<usize> {
        let own = arch_of_file(&candidate.start).filter(|_| args.device.is_none());
        let arch = args.arch.or(own);
        if let Some((_, judge)) = judges.iter().find(|(of, _)| *of == arch) {
            return Ok(*judge);
        }
        let inspection = Inspection::from_args(&InspectArgs { arch, ..args.clone() })?;
        let judge = self.add_judge(place(inspection));
        judges.push((arch, judge));
        Ok(judge)
    }

    pub(super) fn add_judge(&mut self, inspection: Inspection) -> usize {
        self.judges.push(Judge::new(inspection));
        self.judges.len() - 1
    }

    /// Returns the ELF files and the scripts below a directory, sorted, with their names. Links are not followed. A
    /// file with several names is returned once: with a name in `first`, or else with the first of its names.
    pub(super) fn walk(&mut self, directory: &Path, first: &[PathBuf]) -> Vec<(String, Candidate)> {
        let mut files = self.files(directory);
        // The order of a directory's entries differs between file systems.
        files.sort();
        files.sort_by_key(|(path, _)| !first.contains(path));
        let (mut found, mut seen) = (Vec::new(), BTreeSet::new());
        for (path, identity) in files {
            if seen.insert(identity) {
                self.add_candidate(&path, &mut found);
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        found
    }

    /// Returns the regular files below a directory, each with the numbers of its device and its inode.
    fn files(&mut self, directory: &Path) -> Vec<(PathBuf, (u64, u64))> {
        let (mut files, mut pending) = (Vec::new(), vec![directory.to_owned()]);
        while let Some(path) = pending.pop() {
            let entries = match std::fs::read_dir(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>) {
                Ok(entries) => entries,
                Err(error) => {
                    self.unreadable.push(format!("{}: {error}", path.display()));
                    continue;
                }
            };
            for entry in entries {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => pending.push(entry.path()),
                    Ok(metadata) if metadata.is_file() => {
                        files.push((entry.path(), (metadata.dev(), metadata.ino())));
                    }
                    Ok(_) => {}
                    Err(error) => self.unreadable.push(format!("{}: {error}", entry.path().display())),
                }
            }
        }
        files
    }

    fn add_candidate(&mut self, path: &Path, found: &mut Vec<(String, Candidate)>) {
        match Candidate::at(path) {
            Ok(candidate) if !candidate.is_elf() && !candidate.is_script() => {}
            Ok(candidate) if candidate.is_object() => self.objects += 1,
            Ok(candidate) => found.push((clean(&path.to_string_lossy()), candidate)),
            Err(error) => self.unreadable.push(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name decides where a program's libraries are searched, and which entries of a baseline are about it.
    #[test]
    fn a_file_with_several_names_has_the_requested_or_else_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let names: Vec<String> = (0..20).map(|number| format!("{number:02}")).collect();
        std::fs::write(path(&names[0]), b"\x7fELF").unwrap();
        for name in &names[1..] {
            std::fs::hard_link(path(&names[0]), path(name)).unwrap();
        }
        for (first, expected) in [(vec![], "00"), (vec![path("13")], "13")] {
            let found = Collection::default().walk(directory.path(), &first);
            let found: Vec<_> = found.iter().map(|(name, _)| Path::new(name).file_name().unwrap()).collect();
            assert_eq!(found, [expected]);
        }
    }
}
