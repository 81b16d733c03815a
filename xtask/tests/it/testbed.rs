//! A testbed for the tests of `--connect`: a host with a real libvirtd and sshd, and a client beside it, in namespaces
//! of this machine. Nothing in the testbed uses the machine's own libvirt, networks or `.ssh`. Everything in it ends when
//! the value is dropped, when the test's thread ends and when the test is killed. The testbed needs root. To an ordinary
//! user, [`Testbed::open`] says so and fails.
//!
//! # The host
//!
//! It has the network `default` (NAT, virbr0, 192.168.122.0/24, with dnsmasq) and the pool `default`
//! (`/var/lib/libvirt/images`, on a disk: [`Testbed::images`]). Its QEMUs run as root without a security driver. It has
//! no other way out than to the client.
//!
//! | call | what it does |
//! |---|---|
//! | [`Testbed::here`] | Runs a command in the host's mount and network namespaces: `qemu:///system` is the host's libvirtd, and 127.0.0.1 is the loopback of its QEMUs. `/run` and the directories `libvirt` in `/etc`, `/var/lib`, `/var/cache` and `/var/log` are the host's. The rest of these four is read-only. Everything else is the machine's. |
//! | [`Testbed::beside`] | Runs a command on the client, where [`SSH`] is the host's libvirtd behind a real sshd, and `ssh root@10.77.0.2` works, with forwarding in both directions. |
//! | [`Testbed::as_user`] | Runs a command on the host as `nobody`, with a home ([`Testbed::home`]) and a runtime directory of its own, in a read-only view of the checkout; `qemu:///session` starts a libvirtd for it. A new session has no pool: `session().add_session_pool()` adds one. |
//! | [`Testbed::connect`] | Connects the client to the host of a second testbed, for runs on several hosts. |
//! | [`Testbed::daemons`] | Runs a command beside the host's daemons, in their process namespace: pid files are valid there. |
//! | [`Testbed::system`], [`Testbed::session`] | Ask a libvirtd with virsh; see `virsh.rs` and `foreign.rs`. |
//!
//! The first three take a [`Command`](std::process::Command) with its arguments, environment and directory, and return
//! the command in the namespace. Set stdin, stdout and stderr of the returned command. It becomes the program itself:
//! the pid of its child is the program's pid in the machine's process namespace, so that signals and runs' records are
//! as usual. Give a run a private cache (`Scratch`), because a user's cache knows nothing of the testbed.
//!
//! # What can be broken
//!
//! sshd has its usual settings: it forwards ports, but only to and from the loopback. `allow_gateway_ports` permits more.
//! `drop_ssh_sessions`, `cut_link` and `mend_link`, `refuse_logins` and `accept_logins`, `stop_network`,
//! `silence_dhcp`, `add_mute_network` ([`MUTE_NETWORK`]) and `add_tiny_pool` ([`TINY_POOL`]) are methods of [`Testbed`];
//! see `breakage.rs`. No host answers at [`SSH_TO_NOBODY`].
//!
//! # Things of others
//!
//! [`Virsh::add_foreign`](virsh::Virsh::add_foreign) makes domains, volumes and a network that are not ours. `fingerprint` is equal before
//! and after a run that leaves them alone. It contains everything on the host except what `ours` lists.

mod breakage;
mod collected;
mod files;
mod foreign;
mod instance;
mod itself;
mod namespaces;
mod refused;
mod smokes;
mod virsh;

pub(crate) use breakage::{MUTE_NETWORK, TINY_POOL};
pub(crate) use namespaces::{SSH, SSH_TO_NOBODY, Testbed};
