//! The faults of `cargo xtask torture --faults` as data: how long a fault lasts, from what the device must heal and
//! within which time, and what must hold during the fault. From a seed, this crate makes the schedules of the episodes.
//! It finds the faults of a failing schedule that matter. It causes no fault itself.
//!
//! # Bounds
//!
//! A device must heal within the time of the fault's own causes ([`Effect::causes`]) plus
//! [`xtask_core::limits::HEALING`]. The time counts from the end of the last fault of the episode. A boot is not among
//! the causes, because its time depends on the machine: [`Bound::with_boot`] adds it.
//!
//! The modules, each of which uses only those before it:
//!
//! ```text
//! causes effect
//! pairs list
//! episodes shrink statistics
//! ```

mod causes;
mod effect;
mod episodes;
#[cfg(test)]
mod golden;
mod list;
mod pairs;
mod shrink;
mod statistics;

pub use causes::Cause;
pub use effect::{Bound, Effect, Invariant, Means, bound_of, effect_of, invariants_of};
pub use episodes::{Episode, default_episodes, schedule};
pub use list::list;
pub use pairs::{Form, Thing, can_pair, things_of};
pub use shrink::shrink;
pub use statistics::{Healed, statistics, table};
