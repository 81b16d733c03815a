//! A publisher's host over HTTPS: small files, and the lengths of large ones. Each read has a limit in bytes and in
//! time, and Ctrl-C ends it.

use std::error::Error as _;

use anyhow::{Context, Result, bail};
use reqwest::{Client, Method, Response, StatusCode, Url};
use tokio::runtime::Runtime;
use xtask_core::error::Failure;
use xtask_core::image::shown;
use xtask_core::{bail_host, limits};

use crate::fetch::client;
use xtask_jobs::Ui;

/// An HTTPS client, and the runtime that drives it.
#[derive(Debug)]
pub(super) struct Http<'a> {
    client: Client,
    /// `None` only while the client is being dropped.
    runtime: Option<Runtime>,
    ui: &'a Ui,
}

impl<'a> Http<'a> {
    /// Creates the client.
    ///
    /// # Errors
    /// Returns a failure of the host if this host trusts no certificate authority.
    pub(super) fn new(ui: &'a Ui) -> Result<Self> {
        let client = client::builder()
            .connect_timeout(limits::PUBLISHER_CONNECT)
            .timeout(limits::PUBLISHER_ANSWER)
            .build()
            .context(Failure::host(
                "make a client for HTTPS",
                "install the package ca-certificates; check HTTPS_PROXY",
            ))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("start the network's runtime")?;
        Ok(Self { client, runtime: Some(runtime), ui })
    }

    /// Runs `work` until it ends, or until Ctrl-C.
    fn wait<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let runtime = self.runtime.as_ref().context("the network's runtime has ended")?;
        runtime.block_on(async {
            tokio::pin!(work);
            loop {
                tokio::select! {
                    done = &mut work => return done,
                    () = tokio::time::sleep(limits::POLL) => self.ui.check()?,
                }
            }
        })
    }

    async fn ask(&self, method: Method, url: &str) -> Result<Response> {
        let parsed = Url::parse(url).with_context(|| format!("read the address {}", shown(url)))?;
        let sent = self.client.request(method, parsed).send().await;
        let response = sent.map_err(|error| unreachable(url, error))?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            bail_host!("fetch {}: the host answers {status}", shown(url); "try again later");
        }
        Ok(response)
    }

    /// Returns the content at `url`, at most `limit_bytes`.
    pub(super) fn get(&self, url: &str, limit_bytes: u64) -> Result<Vec<u8>> {
        self.wait(async {
            let mut response = self.ask(Method::GET, url).await?;
            if !response.status().is_success() {
                bail!("fetch {}: the host answers {}", shown(url), response.status());
            }
            let mut content = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|error| unreachable(url, error))? {
                content.extend_from_slice(&chunk);
                if content.len() as u64 > limit_bytes {
                    bail!("fetch {}: it is longer than the limit of {limit_bytes} bytes", shown(url));
                }
            }
            Ok(content)
        })
    }

    /// Returns the length of the file at `url`, if the host reports it.
    pub(super) fn length(&self, url: &str) -> Result<Option<u64>> {
        self.wait(async {
            let response = self.ask(Method::HEAD, url).await?;
            let status = response.status();
            if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
                bail!("look for {}: the host answers {status}", shown(url));
            }
            // A host need not answer HEAD. Read the header: reqwest reports the length of the body, and an answer to
            // HEAD has no body.
            let header = response.headers().get(reqwest::header::CONTENT_LENGTH);
            let length = header.and_then(|value| value.to_str().ok()?.parse().ok());
            Ok(length.filter(|length| status.is_success() && *length > 0))
        })
    }
}

impl Drop for Http<'_> {
    fn drop(&mut self) {
        // Dropping the runtime would wait for a resolver that hangs in its own thread. This does not wait.
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

/// Describes a failed request. The address is shown without its login, while reqwest's text would contain all of it.
fn unreachable(url: &str, error: reqwest::Error) -> anyhow::Error {
    let redirected = error.is_redirect();
    let error = error.without_url();
    if redirected {
        let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        return anyhow::anyhow!("fetch {}: {why}", shown(url));
    }
    anyhow::Error::new(error).context(Failure::host(
        format!("fetch {}: the host cannot be reached or stopped answering", shown(url)),
        "check this machine's network; behind a proxy, set HTTPS_PROXY; otherwise try again later",
    ))
}
