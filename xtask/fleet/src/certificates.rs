//! The certificates of a run's broker. They are issued by an authority of the run, whose key is not kept.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use xtask_core::fs::write_private;
use xtask_core::limits;
use xtask_core::machine::HOST_FROM_GUEST;

/// The name that a run may give to the broker in the guest.
pub const FLEET_NAME: &str = "fleet.test";

/// The addresses and the name of the broker, on this host and in the guest.
const ADDRESSES: [&str; 3] = ["127.0.0.1", HOST_FROM_GUEST, FLEET_NAME];

/// The file names of the server's certificate and key, and of the authority's certificate.
const CERTIFICATE: &str = "server.pem";
const KEY: &str = "server.key";
const CA: &str = "ca.pem";

/// The files of a broker that speaks TLS.
#[derive(Debug)]
pub(super) struct Certificates {
    /// The certificate of the authority, as PEM.
    pub(super) ca: String,
    pub(super) ca_file: PathBuf,
    /// The part of the server's configuration that names its certificate and its key.
    pub(super) server: String,
}

impl Certificates {
    /// Issues a certificate for the broker and writes it to `directory`. `authority` is the name of the issuer, whose key
    /// is a new one. The certificates are valid from 1975 to 4096, because a guest may have a wrong clock.
    pub(super) fn issue(directory: &Path, authority: &str) -> Result<Self> {
        let mut params = named(authority, Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().context("make a key")?)
            .context("make the run's certificate authority")?;
        let server_key = KeyPair::generate().context("make a key")?;
        let issued = named("the broker of a run", ADDRESSES.map(str::to_owned).into())?
            .signed_by(&server_key, &ca)
            .context("issue the broker's certificate")?;
        write_private(&directory.join(CERTIFICATE), issued.pem())?;
        write_private(&directory.join(KEY), server_key.serialize_pem())?;
        write_private(&directory.join(CA), ca.pem())?;
        Ok(Self::in_directory(directory, ca.pem()))
    }

    fn in_directory(directory: &Path, ca: String) -> Self {
        let path = |name| directory.join(name).display().to_string();
        let server = format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\", timeout: {} }}\n",
            path(CERTIFICATE),
            path(KEY),
            limits::BROKER_LOGIN.as_secs()
        );
        Self { ca, ca_file: directory.join(CA), server }
    }

    /// Copies the certificates and the server's key to `directory`.
    pub(super) fn copy_to(&self, directory: &Path) -> Result<()> {
        let from = self.ca_file.parent().context("the certificates have no directory")?;
        [CERTIFICATE, KEY, CA]
            .iter()
            .try_for_each(|name| write_private(&directory.join(name), fs_err::read(from.join(name))?))
    }

    /// Copies certificates from `kept`, to which they were copied by [`Self::copy_to`], to `directory`.
    pub(super) fn read(kept: &Path, directory: &Path) -> Result<Self> {
        let copied = Self::in_directory(kept, fs_err::read_to_string(kept.join(CA))?);
        copied.copy_to(directory)?;
        Ok(Self::in_directory(directory, copied.ca))
    }
}

/// Returns the parameters of a certificate. The names of an issuer and of its certificates must differ, because OpenSSL
/// takes a certificate whose names are equal for a self-signed one.
fn named(name: &str, addresses: Vec<String>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(addresses).context("make a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}
