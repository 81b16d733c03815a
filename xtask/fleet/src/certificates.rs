//! The certificates of a run's broker. They are issued by an authority of the run, whose key is not kept.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use xtask_core::fs::write_private;
use xtask_core::machine::HOST_FROM_GUEST;

/// The addresses of the broker, on this host and in the guest.
const ADDRESSES: [&str; 2] = ["127.0.0.1", HOST_FROM_GUEST];

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
    /// Issues a certificate for the broker and writes it to `directory`. The certificates are valid from 1975 to 4096,
    /// because a guest may have a wrong clock.
    pub(super) fn issue(directory: &Path) -> Result<Self> {
        let (certificate, key) = (directory.join("server.pem"), directory.join("server.key"));
        let ca_file = directory.join("ca.pem");
        let mut params = named("the certificate authority of a run", Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().context("make a key")?)
            .context("make the run's certificate authority")?;
        let server_key = KeyPair::generate().context("make a key")?;
        let issued = named("the broker of a run", ADDRESSES.map(str::to_owned).into())?
            .signed_by(&server_key, &ca)
            .context("issue the broker's certificate")?;
        write_private(&certificate, issued.pem())?;
        write_private(&key, server_key.serialize_pem())?;
        write_private(&ca_file, ca.pem())?;
        let server =
            format!("tls {{ cert_file: \"{}\", key_file: \"{}\" }}\n", certificate.display(), key.display());
        Ok(Self { ca: ca.pem(), ca_file, server })
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
