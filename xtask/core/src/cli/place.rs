//! The flags that choose the libvirt that runs a guest, and the guest's network.

use std::str::FromStr;

use clap::Args;

use crate::error::Failure;
use crate::libvirt_uri::ConnectUri;

/// The name of the network, and also of the storage pool, that libvirt's tools use by default.
pub const DEFAULT_NAME: &str = "default";

/// The libvirt that runs a guest, the network and the storage pool.
#[derive(Debug, Clone, Default, Args)]
pub struct PlaceArgs {
    /// The libvirt that runs the guest: qemu:///session, qemu:///system, qemu+ssh://USER@HOST/system [default: an embedded one]
    #[arg(long, value_name = "URI")]
    pub connect: Option<ConnectUri>,

    /// The guest's network: user, or nat[:NAME] for a network of the libvirt of --connect [default: user]
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<Network>,

    /// The storage pool of the libvirt of --connect for the guest's disks [default: default]
    #[arg(long, value_name = "NAME")]
    pub pool: Option<String>,
}

impl PlaceArgs {
    /// Returns the network of the guest.
    pub fn network(&self) -> Network {
        self.network.clone().unwrap_or_default()
    }

    /// Returns the name of the storage pool.
    pub fn pool(&self) -> &str {
        self.pool.as_deref().unwrap_or(DEFAULT_NAME)
    }

    /// Checks that the flags fit together.
    ///
    /// # Errors
    /// Returns a usage error if a network or a pool is requested without a libvirt daemon, or a network of a user's
    /// daemon, which cannot make networks.
    pub fn check(&self) -> Result<(), Failure> {
        let nat = matches!(self.network, Some(Network::Nat(_)));
        match &self.connect {
            None if nat => Err(Failure::usage(
                "--network nat needs a libvirt daemon, which has the network; add --connect qemu:///system",
            )),
            None if self.pool.is_some() => Err(Failure::usage(
                "--pool needs a libvirt daemon, which has the storage pool; add --connect qemu:///system",
            )),
            Some(uri) if nat && uri.session => Err(Failure::usage(format!(
                "--network nat: {uri} is the daemon of a user, which has no such networks; use --network user, or \
                 --connect qemu:///system"
            ))),
            _ => Ok(()),
        }
    }

    /// Checks that a guest can run there.
    ///
    /// # Errors
    /// Returns the errors of [`PlaceArgs::check`], and a usage error for a transport over which no guest can be used.
    pub fn check_to_run(&self) -> Result<(), Failure> {
        self.check()?;
        match &self.connect {
            Some(uri) if !["unix", "ssh"].contains(&uri.transport.as_str()) => Err(Failure::usage(format!(
                "the libvirt {uri}: the transport {} does not reach the guest's ports; use qemu:///system or \
                 qemu+ssh://USER@HOST/system",
                uri.transport
            ))),
            _ => Ok(()),
        }
    }
}

/// The network of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// QEMU's user-mode network.
    #[default]
    User,
    /// The network of libvirt with this name, whose DHCP server gives the guest its address.
    Nat(String),
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "user" => Ok(Self::User),
            None if text == "nat" => Ok(Self::Nat(DEFAULT_NAME.to_owned())),
            Some(("nat", name)) if !name.is_empty() => Ok(Self::Nat(name.to_owned())),
            _ => Err("there are: user, nat (the network default), nat:NAME".to_owned()),
        }
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User => f.write_str("user"),
            Self::Nat(name) => write!(f, "nat:{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_user_or_one_of_libvirt() {
        let nat = |name: &str| Network::Nat(name.to_owned());
        for (text, network) in [
            ("user", Network::User),
            ("nat", nat("default")),
            ("nat:lab", nat("lab")),
            ("nat:a:b", nat("a:b")),
        ] {
            assert_eq!(text.parse(), Ok(network), "{text}");
        }
        for text in ["", "nat:", "bridge", "user:x", "default"] {
            assert!(text.parse::<Network>().unwrap_err().contains("nat:NAME"), "{text}");
        }
    }

    #[test]
    fn flags_that_do_not_fit_together_are_usage_errors() {
        let place = |uri: Option<&str>, network: Option<&str>| PlaceArgs {
            connect: uri.map(|uri| uri.parse().unwrap()),
            network: network.map(|network| network.parse().unwrap()),
            pool: None,
        };
        for (uri, network, refused) in [
            (None, None, None),
            (None, Some("user"), None),
            (None, Some("nat"), Some("needs a libvirt daemon")),
            (Some("qemu:///session"), Some("user"), None),
            (Some("qemu:///session"), Some("nat"), Some("daemon of a user")),
            (Some("qemu:///system"), Some("nat:lab"), None),
            (Some("qemu+ssh://host/system"), Some("nat"), None),
            (Some("qemu+tcp://host/system"), None, Some("transport tcp")),
        ] {
            let checked = place(uri, network).check_to_run().map_err(|error| error.to_string());
            match refused {
                None => assert_eq!(checked, Ok(()), "{uri:?} {network:?}"),
                Some(words) => assert!(checked.unwrap_err().contains(words), "{uri:?} {network:?}"),
            }
        }
    }
}
