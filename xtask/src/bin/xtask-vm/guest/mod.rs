//! The guest from outside: its console, ssh into it, the disks that it is given, what it runs.

pub(crate) mod console;
pub(crate) mod filesystem;
pub(crate) mod media;
pub(crate) mod ssh;
pub(crate) mod watch;
pub(crate) mod workload;
