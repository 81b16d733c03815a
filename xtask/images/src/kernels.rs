//! The part of `cargo xtask image prune` that deletes the kernels of `cargo xtask try`.

use anyhow::Result;
use xtask_core::cli::PruneArgs;
use xtask_core::error::Kind;
use xtask_core::fs::{directories, is_own, try_lock};
use xtask_core::kernel::Kernel;

use crate::prune::{DAY, Deletion};
use crate::store::{Store, idle_seconds, name_of};

/// The ending of the name of a directory in which a kernel is being made.
const MAKING: &str = ".making";

/// Deletes the kernels that no device uses any more, and those that were not used for the requested number of days.
/// `try` downloads a kernel again when it needs it.
pub(crate) fn prune(store: &Store<'_>, args: &PruneArgs) -> Result<Vec<Deletion>> {
    let known: Vec<_> = Kernel::all().map(Kernel::key).collect();
    let mut deleted = Vec::new();
    for directory in directories(&store.cache.kernels()) {
        let (key, idle) = (name_of(&directory), idle_seconds(&directory));
        if !key.starts_with("linux-image-") || !is_own(&directory) {
            continue;
        }
        let reason = match args.older_than {
            _ if key.ends_with(MAKING) => "a kernel whose download ended early".to_owned(),
            _ if !known.contains(&key) => "a kernel that no device uses".to_owned(),
            Some(days) if idle >= days * DAY => format!("not used for {} days", idle / DAY),
            _ => continue,
        };
        let deletion = || -> Result<bool> {
            let lock = key.strip_suffix(MAKING).unwrap_or(&key);
            // A process that makes or reads the kernel holds this lock.
            let Some(_lock) = try_lock(&store.cache.kernels().join(format!("{lock}.lock")))? else {
                return Ok(false);
            };
            if !args.dry_run {
                crate::discard::discard(&directory, store.ui)?;
            }
            Ok(true)
        };
        let bytes = directory.join("vmlinuz").metadata().map_or(0, |about| about.len());
        match deletion() {
            Ok(false) => {}
            Ok(true) => {
                store.ui.note(&format!(
                    "{} {key}: {reason}",
                    if args.dry_run { "would delete" } else { "deleted" }
                ));
                deleted.push(Deletion { key, bytes, reason });
            }
            Err(error) if Kind::Interrupted.is(&error) => return Err(error),
            Err(error) => store.ui.line(&format!("not deleted: {key}: {error:#}")),
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use xtask_core::cache::Cache;
    use xtask_core::fs::make_own_dir;
    use xtask_jobs::Ui;

    use super::*;

    #[test]
    fn only_kernels_that_nobody_uses_are_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let (cache, ui) = (Cache::at(directory.path()), Ui::quiet());
        let current = Kernel::all().next().unwrap().key();
        let other = Kernel::all().nth(1).unwrap().key();
        let names = [
            current.clone(),
            "linux-image-old-0".to_owned(),
            format!("{current}{MAKING}"),
            format!("{other}{MAKING}"),
            "my-own-copy".to_owned(),
        ];
        names.iter().for_each(|name| make_own_dir(&cache.kernels().join(name)).unwrap());
        std::fs::create_dir_all(cache.kernels().join("linux-image-foreign")).unwrap();
        let _held = try_lock(&cache.kernels().join(format!("{other}.lock"))).unwrap().unwrap();
        let store = Store { cache: &cache, ui: &ui, offline: true, run: None };
        let pruned = |args: &PruneArgs| {
            let mut keys: Vec<_> = prune(&store, args).unwrap().into_iter().map(|one| one.key).collect();
            keys.sort();
            keys
        };
        let expected = [format!("{current}{MAKING}"), "linux-image-old-0".to_owned()];
        assert_eq!(pruned(&PruneArgs { dry_run: true, ..PruneArgs::default() }), expected);
        assert_eq!(pruned(&PruneArgs::default()), expected);
        let left = [&names[0], &names[3], &names[4], &"linux-image-foreign".to_owned()];
        assert!(left.iter().all(|name| cache.kernels().join(name).exists()));
        assert_eq!(pruned(&PruneArgs { older_than: Some(0), ..PruneArgs::default() }), [current]);
    }
}
