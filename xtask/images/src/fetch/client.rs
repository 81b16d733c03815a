//! The HTTP client, and the causes of its failures.

use std::error::Error as StdError;
use std::time::Duration;

use anyhow::Result;
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, ClientBuilder};
use xtask_core::error::Failure;
use xtask_core::image::shown;

use super::address::Address;
use super::limits::{CONNECT, FetchLimits};

/// Upper bound for the redirects of one request. Browsers follow twenty redirects, and a mirror needs three.
const MAX_REDIRECTS: usize = 10;

const CHECK_PROXY: &str = "check HTTPS_PROXY and HTTP_PROXY (http://user:password@host:port), and NO_PROXY for hosts on this side of the proxy";

/// The reason why an attempt ended without the file.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The next attempt may succeed, but not before the pause `after`.
    Passing { error: anyhow::Error, after: Option<Duration> },
    /// The partial file cannot be completed. The whole file may be requested at once.
    StartOver(String),
    /// Another attempt would end the same way.
    Final(anyhow::Error),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// Returns the builder of every client of this program. Proxies come from the environment, and trusted roots from
/// SSL_CERT_FILE or the system. No redirect leads from https to http.
pub fn builder() -> ClientBuilder {
    // An error means that another download of this process has already installed the same provider.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .user_agent(concat!("iot-xtask/", env!("CARGO_PKG_VERSION")))
        .referer(false)
        .redirect(Policy::custom(follow))
}

/// Builds the downloader's own client. It keeps no idle connections, so that a retry does not use the connection that
/// just failed.
pub(super) fn build(limits: FetchLimits) -> Result<Client> {
    let client = builder().connect_timeout(limits.paced(CONNECT)).pool_max_idle_per_host(0);
    // The unit tests of this crate request only loopback. Tests with proxies are processes of their own.
    #[cfg(test)]
    let client = client.no_proxy();
    let client = client.build();
    client.map_err(|error| {
        let error = format!("prepare TLS for a download: {}", root_cause(&error));
        let hint =
            "install the package ca-certificates, or point SSL_CERT_FILE at a PEM file of trusted roots";
        Failure::unreachable(error, hint).into()
    })
}

/// Follows a redirect, or refuses it with a reason.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let to = shown(attempt.url().as_str());
    let previous = attempt.previous();
    let refused = if previous.contains(attempt.url()) {
        format!("a redirect loop: {to} again")
    } else if previous.len() > MAX_REDIRECTS {
        format!("more than {MAX_REDIRECTS} redirects, the next one to {to}")
    } else if previous.last().is_some_and(|from| from.scheme() == "https")
        && attempt.url().scheme() != "https"
    {
        format!("a redirect from https to {to}, which is not protected against changes on the way")
    } else {
        return attempt.follow();
    };
    attempt.error(refused)
}

/// Classifies a failed request.
pub(super) fn trouble(error: reqwest::Error, address: &Address) -> Trouble {
    // The error's own text would repeat the complete URL.
    let error = error.without_url();
    let cause = root_cause(&error);
    if error.is_redirect() {
        let hint = "use the final URL of the file, or contact its publisher";
        return Trouble::Final(Failure::host(format!("download {address}: {cause}"), hint).into());
    }
    if !error.is_connect() {
        return passing(format!("download {address}: the connection broke: {cause}"));
    }
    let unreachable = |hint: &str| Failure::unreachable(format!("{}: {cause}", reach(address)), hint);
    if chain(&error).any(is_tls) {
        let hint = "behind a proxy with its own CA, point SSL_CERT_FILE at a PEM file with that CA; check this machine's clock too";
        return Trouble::Final(unreachable(hint).into());
    }
    // hyper-util does not export its error type, so its messages are compared. The first one stands for a 407. The
    // second one stands for every other refusal, and some of those are temporary (503).
    let refused = |message: &str| proxy_refuses(address, message);
    if cause.contains("proxy authorization required") {
        return Trouble::Final(refused("the proxy requires credentials").into());
    }
    if cause.contains("tunnel error") {
        return Trouble::Passing { error: refused(&format!("the proxy: {cause}")).into(), after: None };
    }
    let hint = if proxy_for(address).is_some() {
        CHECK_PROXY
    } else if error.is_dns() {
        "check the host name and this machine's DNS; behind a proxy set HTTPS_PROXY"
    } else {
        "check the network; behind a proxy set HTTPS_PROXY, and NO_PROXY for hosts on this side of it"
    };
    Trouble::Passing { error: unreachable(hint).into(), after: None }
}

/// Describes the attempt to reach an address, with the proxy that the attempt uses.
fn reach(address: &Address) -> String {
    match proxy_for(address) {
        Some(proxy) => format!("reach {address} through the proxy {proxy} of the environment"),
        None => format!("reach {address}"),
    }
}

/// Returns the proxy for an address, without the proxy's credentials. Returns `None` if the environment names no proxy
/// for this address.
fn proxy_for(address: &Address) -> Option<String> {
    // reqwest finds its proxies in the same way.
    let proxy = Matcher::from_system().intercept(&address.url().as_str().parse().ok()?)?;
    Some(shown(&proxy.uri().to_string()).trim_end_matches('/').to_owned())
}

/// Returns the failure for a proxy that refuses a request.
pub(super) fn proxy_refuses(address: &Address, message: &str) -> Failure {
    Failure::unreachable(format!("{}: {message}", reach(address)), CHECK_PROXY)
}

/// Returns the trouble for a failure of the network, which may pass.
pub(super) fn passing(error: String) -> Trouble {
    let hint = "run again: the download resumes where it stopped";
    Trouble::Passing { error: Failure::host(error, hint).into(), after: None }
}

/// Iterates over all causes. The `source` of an I/O error skips the error that it wraps. This function includes the
/// wrapped error.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| {
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
        wrapped.map(|inner| inner as &(dyn StdError + 'static)).or_else(|| error.source())
    })
}

fn is_tls(error: &(dyn StdError + 'static)) -> bool {
    error.is::<rustls::Error>()
}

fn root_cause(error: &reqwest::Error) -> String {
    chain(error).last().map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_cause_is_found() {
        let inner = rustls::Error::General("no".to_owned());
        let error = std::io::Error::other(std::io::Error::other(inner));
        assert!(chain(&error).any(is_tls));
        assert_eq!(chain(&error).last().unwrap().to_string(), "unexpected error: no");
    }
}
