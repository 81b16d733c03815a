//! Pulls an image from its registry. The request is one of Docker's API, which podman offers too, because libpod's own
//! request reports no bytes.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::BodyExt as _;
use hyper::Request;
use hyper::header::HeaderValue;
use serde::Deserialize;
use tokio::time::timeout;

use super::Podman;
use super::http::{DOCKER_API, empty, encoded};

/// A line of podman's answer. A layer is named by the beginning of its digest.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Line {
    id: String,
    progress_detail: ProgressDetail,
    error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProgressDetail {
    /// The bytes of the layer that have been downloaded.
    current: u64,
}

impl Podman {
    /// Pulls an image. There is no limit for the whole time, because a large image takes long on a slow line. `login`
    /// is the value of the header `X-Registry-Auth`. Calls `on_progress` with the number of bytes that have been
    /// downloaded so far; an error of it ends the download.
    ///
    /// # Errors
    /// Returns an error if the registry refuses, if podman fails, or if podman reports no progress for the time
    /// `silence`.
    pub(crate) async fn pull(
        &self,
        reference: &str,
        login: Option<&str>,
        silence: Duration,
        mut on_progress: impl FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let uri = format!("{DOCKER_API}/images/create?fromImage={}", encoded(reference));
        let silent = || format!("podman has reported no progress for {} s", silence.as_secs());
        let pulled = async {
            let mut request = Request::post(uri).body(empty()).context("build a request to podman")?;
            if let Some(login) = login {
                let mut value = HeaderValue::from_str(login).context("build a header with the login")?;
                value.set_sensitive(true);
                request.headers_mut().insert("x-registry-auth", value);
            }
            let response = timeout(silence, self.send_request(request)).await.with_context(silent)??;
            let mut body = response.into_body();
            let mut progress = Progress::default();
            while let Some(frame) = timeout(silence, body.frame()).await.with_context(silent)? {
                if let Ok(data) = frame.context("read podman's answer")?.into_data() {
                    on_progress(progress.read(&data)?)?;
                }
            }
            progress.end()
        };
        pulled.await.with_context(|| format!("pull the image {reference}"))
    }
}

/// The upper bound for one line of the answer.
const MAX_LINE: usize = 64 << 10;

/// Reads the lines of podman's answer.
#[derive(Debug, Default)]
struct Progress {
    incomplete: Vec<u8>,
    bytes: HashMap<String, u64>,
    error: Option<String>,
}

impl Progress {
    /// Reads a part of the answer. Returns the number of bytes of all layers.
    fn read(&mut self, part: &[u8]) -> Result<u64> {
        for byte in part {
            if *byte != b'\n' {
                self.incomplete.push(*byte);
                if self.incomplete.len() > MAX_LINE {
                    bail!("a line of podman's answer is longer than {MAX_LINE} bytes");
                }
                continue;
            }
            let line = std::mem::take(&mut self.incomplete);
            let Ok(Line { id, progress_detail: ProgressDetail { current }, error }) =
                serde_json::from_slice(&line)
            else {
                continue;
            };
            self.error = error.or(self.error.take());
            // Other lines of the same layer have no number.
            let known = self.bytes.entry(id).or_default();
            *known = current.max(*known);
        }
        Ok(self.bytes.values().sum())
    }

    fn end(self) -> Result<()> {
        match self.error {
            Some(error) => bail!("{error}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_added_and_the_error_is_the_result() {
        let mut progress = Progress::default();
        let read = |progress: &mut Progress, text: &str| progress.read(text.as_bytes()).unwrap();
        assert_eq!(
            read(
                &mut progress,
                "{\"status\":\"Pulling fs layer\",\"progressDetail\":{},\"id\":\"a\"}\n{\"st"
            ),
            0
        );
        let rest = "atus\":\"Downloading\",\"progressDetail\":{\"current\":5,\"total\":9},\"id\":\"a\"}\n\
                    {\"progressDetail\":{\"current\":7},\"id\":\"b\"}\n{\"progressDetail\":{},\"id\":\"a\"}\nno JSON\n";
        assert_eq!(read(&mut progress, rest), 12);
        assert!(Progress::default().end().is_ok());
        read(&mut progress, "{\"error\":\"manifest unknown\"}\n{\"progressDetail\":{},\"id\":\"a\"}\n");
        assert_eq!(progress.end().unwrap_err().to_string(), "manifest unknown");
        assert!(Progress::default().read(&[b'x'; MAX_LINE + 1]).is_err());
    }
}
