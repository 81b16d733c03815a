//! Tests of the agent against a real nats-server and a real podman. The agent always reaches the desired
//! state in the end. `cargo xtask ci` runs these tests after a preflight.

mod backup;
mod bucket;
mod cluster;
mod cost;
mod device;
mod endurance;
mod fleet;
mod healing;
mod images;
mod leaf;
mod life;
mod logins;
mod obstacles;
mod pod;
mod pulls;
mod registry;
mod rollback;
mod series;
mod slow;
mod tags;
