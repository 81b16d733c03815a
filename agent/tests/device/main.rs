//! The agent against a real nats-server and a real podman: whatever happens, the desired state is reached in the end. Run by
//! `cargo xtask ci`, after a preflight.

mod device;
mod endurance;
mod fleet;
mod life;
mod logins;
mod pod;
