//! Images and snapshots in the cache. Each of them has a key, which stands for its content and names its directory. An
//! image is made in a directory beside its final one while a lock is held, and is renamed when it is complete.
//! [`build`] makes images from packages, `fetch` downloads them from their publisher, and a user's own file stays
//! where it is.
//!
//! ```text
//! images/<key>/disk           the disk, read-only; manifest.json is beside it
//! images/<key>.building/      an image that is being built; if its run died, the next build deletes it
//! images/<key>.deleting/      an image that is being deleted; if its run died, the next build deletes it
//! images/<key>.fetching/      an image that is being fetched; if its run died, the next fetch resumes it
//! images/<key>.lock           held while a process makes or deletes the image, or records that a run uses it
//! ```

pub mod build;
mod bump;
pub mod commands;
pub mod discard;
pub mod ensure;
pub mod fetch;
pub mod inventory;
mod kernels;
mod make;
mod probe;
mod prune;
pub mod snapshots;
pub mod store;

pub use build::bootstrap::{Speed, bootstrap};
pub use discard::discard;
pub use ensure::{ensure, find, locate};
pub use store::{Base, CachedImage, ReadyImage, Store};
