//! The ways to break the testbed's network, logins and storage. Each method returns when the fault is in place.

use super::files::accept_key;
use super::namespaces::{Testbed, done};
use crate::scratch::command;

/// A pool with [`TINY_POOL_SIZE`], below `/run`. It is not on a disk.
pub(crate) const TINY_POOL: &str = "tiny";
const TINY_POOL_SIZE: &str = "64m";

/// An active NAT network without DHCP.
pub(crate) const MUTE_NETWORK: &str = "mute";

impl Testbed {
    /// Runs a shell script beside the daemons.
    #[track_caller]
    fn among_daemons(&self, script: &str) -> String {
        done(&mut self.daemons(&command("sh", &["-euc", script])))
    }

    /// Kills each process of sshd that serves a connection, and returns their number. The client's ssh sees the end of
    /// its connection.
    pub(crate) fn drop_ssh_sessions(&self) -> usize {
        let script = "listener=$(cat /run/sshd.pid); for session in $(cat /proc/$listener/task/$listener/children); \
                      do kill -KILL $session; echo $session; done";
        self.among_daemons(script).lines().count()
    }

    /// Takes the link between client and host down. Packets are lost, and neither side is told.
    pub(crate) fn cut_link(&self) {
        done(&mut self.here(&command("ip", &["link", "set", "host0", "down"])));
    }

    pub(crate) fn mend_link(&self) {
        done(&mut self.here(&command("ip", &["link", "set", "host0", "up"])));
    }

    /// Makes sshd refuse each later login. The connections that exist go on.
    pub(crate) fn refuse_logins(&self) {
        accept_key(self.path(), false);
    }

    pub(crate) fn accept_logins(&self) {
        accept_key(self.path(), true);
    }

    /// Lets ssh's clients choose the address of a port that the host forwards to them, such as 192.168.122.1. sshd's
    /// default is the loopback, which a guest of a NAT network cannot reach.
    pub(crate) fn allow_gateway_ports(&self) {
        let config = self.path().join("sshd/config");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(config, text + "GatewayPorts clientspecified\n").unwrap();
        // sshd starts itself again, and then writes its pid file.
        self.among_daemons(
            "listener=$(cat /run/sshd.pid); rm /run/sshd.pid; kill -HUP $listener; \
             while [ ! -s /run/sshd.pid ]; do sleep 0.02; done",
        );
    }

    /// Stops the network `default`.
    pub(crate) fn stop_network(&self) {
        self.system().run(&["net-destroy default"]);
    }

    /// Kills the DHCP server of the network `default`. libvirt still calls the network active.
    pub(crate) fn silence_dhcp(&self) {
        // The helper that records the leases is a child of dnsmasq, and ends with it.
        self.among_daemons(
            "server=$(cat /run/libvirt/network/default.pid); kill -KILL $server; \
             while [ -e /proc/$server/exe ]; do sleep 0.02; done",
        );
    }

    /// Adds the active network [`MUTE_NETWORK`].
    pub(crate) fn add_mute_network(&self) {
        let xml = format!(
            "<network><name>{MUTE_NETWORK}</name><forward mode='nat'/><bridge name='virbr7'/>\
             <ip address='192.168.127.1' netmask='255.255.255.0'/></network>"
        );
        self.system().define("net-define", &xml);
        self.system().run(&[&format!("net-start {MUTE_NETWORK}")]);
    }

    /// Adds the active pool [`TINY_POOL`].
    pub(crate) fn add_tiny_pool(&self) {
        let script = format!("mkdir /run/tiny; mount -t tmpfs -o size={TINY_POOL_SIZE} tmpfs /run/tiny");
        done(&mut self.here(&command("sh", &["-euc", &script])));
        self.system().run(&[
            &format!("pool-define-as {TINY_POOL} dir --target /run/tiny"),
            &format!("pool-start {TINY_POOL}"),
        ]);
    }
}
