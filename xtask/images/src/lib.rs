//! Images and snapshots in the cache. Images: one directory per content key, made behind a lock, beside, and renamed when whole. [`build`] makes
//! them from packages, `fetch` brings them from their publisher, and a user's own file stays where it is.
//!
//! ```text
//! images/<key>/disk           read-only, and manifest.json
//! images/<key>.building/      what is being built, or deleted; of a dead run the next build deletes it
//! images/<key>.fetching/      what is being fetched; of a dead run the next one goes on with it
//! images/<key>.lock           held by whoever makes or deletes it, or says that a run uses it
//! ```

pub mod build;
mod bump;
pub mod commands;
pub mod discard;
pub mod ensure;
pub mod fetch;
pub mod inventory;
mod make;
mod probe;
mod prune;
pub mod snapshots;
pub mod store;

pub use build::bootstrap::{Speed, bootstrap};
pub use discard::discard;
pub use ensure::{ensure, find, glance};
pub use store::{Base, CachedImage, ReadyImage, Store};
