//! The programs of the workload's image, which rustc compiles alone. A test of `inspect` compiles this file, too.

use xtask_core::build::standalone::Standalone;

/// The workload of a smoke.
pub(super) const SOUND: Standalone = Standalone { name: "workload", sources: &["xtask/workload/main.rs"] };

/// The workload of the planted fault `small-pages`.
pub(super) const SMALL_PAGES: Standalone =
    Standalone { name: "workload", sources: &["xtask/workload/small_pages.rs", "xtask/workload/main.rs"] };

/// The workload of the planted fault `unsynced-volume`.
pub(super) const UNSYNCED_VOLUME: Standalone = Standalone {
    name: "workload",
    sources: &["xtask/workload/unsynced_volume.rs", "xtask/workload/main.rs"],
};
