//! Requests to podman: HTTP over its Unix socket, a connection for each, and what a refusal says.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// libpod's, not Docker's; the oldest version that has all that is asked (Debian 12's podman is 4.3).
const API: &str = "/v4.0.0/libpod";
/// The longest answer that is read: a listing of thousands of containers.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// Where podman listens.
#[derive(Debug, Clone)]
pub(super) struct Socket(PathBuf);

/// Podman response no.
#[derive(Debug)]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    message: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

impl Socket {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(super) fn exists(&self) -> bool {
        self.0.exists()
    }

    /// One request, its whole answer, within `patience`.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Body,
        patience: Duration,
    ) -> Result<Bytes> {
        let answered = async {
            let response = self.send(method, path, body).await?;
            let mut incoming = response.into_body();
            let mut bytes = BytesMut::new();
            while let Some(frame) = incoming.frame().await {
                if let Ok(data) = frame.context("read podman's answer")?.into_data() {
                    ensure!(bytes.len() + data.len() <= MAX_RESPONSE_BYTES, "podman's answer is too long");
                    bytes.extend_from_slice(&data);
                }
            }
            Ok(bytes.freeze())
        };
        timeout(patience, answered)
            .await
            .with_context(|| format!("podman has not answered within {} s", patience.as_secs()))?
    }

    pub(super) async fn send(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.0)
            .await
            .with_context(|| format!("reach podman at {}", self.0.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .with_context(|| format!("talk to podman at {}", self.0.display()))?;
        // Ends with the request, or with its answer's body.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection to podman ended: {error}");
            }
        });
        let request = Request::builder()
            .method(method)
            .uri(format!("{API}{path}"))
            .header("host", "podman")
            .header("content-type", "application/json")
            .body(body)
            .context("write a request for podman")?;
        let response = sender.send_request(request).await.context("ask podman")?;
        let status = response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        let text = response.into_body().collect().await.context("read podman's refusal")?.to_bytes();
        Err(refusal(status, &text).into())
    }
}

pub(super) type Body = BoxBody<Bytes, std::io::Error>;

pub(super) fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

pub(super) fn read<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).with_context(|| {
        format!("read podman's answer {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(200)]))
    })
}

/// `{"cause":"…","message":"…","response":500}`
fn refusal(status: StatusCode, text: &[u8]) -> ApiError {
    let response: Option<Value> = serde_json::from_slice(text).ok();
    let message = response.as_ref().and_then(|response| response["message"].as_str());
    let message =
        message.map_or_else(|| format!("podman answers {status}"), |message| message.trim().to_owned());
    ApiError { status: status.as_u16(), message }
}

/// Percent-encoding of everything that is not unreserved (RFC 3986, 2.3).
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("a string takes what is written to it");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_and_filters_are_encoded() {
        assert_eq!(encoded("localhost/a:1"), "localhost%2Fa%3A1");
        assert_eq!(encoded(r#"{"a":["b=c"]}"#), "%7B%22a%22%3A%5B%22b%3Dc%22%5D%7D");
    }

    #[test]
    fn refusals_say_what_podman_said() {
        let response =
            br#"{"cause":"no such image","message":"localhost/a:1: image not known","response":404}"#;
        let refused = refusal(StatusCode::NOT_FOUND, response);
        assert_eq!((refused.status, refused.to_string().as_str()), (404, "localhost/a:1: image not known"));
        assert_eq!(refusal(StatusCode::BAD_GATEWAY, b"<html>").to_string(), "podman answers 502 Bad Gateway");
    }
}
