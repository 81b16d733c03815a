//! HTTP requests over podman's Unix socket, each on a connection of its own.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Podman;

/// libpod's API, in the oldest version that has all requests of this client (Debian 12 has podman 4.3).
const API: &str = "/v4.0.0/libpod";
/// Docker's API, in a version that podman has offered since 3.0.
pub(super) const DOCKER_API: &str = "/v1.40";
/// Upper bound for an answer; enough for a listing of thousands of containers.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// An error that podman reports.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct ApiError {
    /// The HTTP status.
    pub(super) status: u16,
    message: String,
}

impl Podman {
    /// Sends a request and returns the complete body of the answer.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Body,
        limit: Duration,
    ) -> Result<Bytes> {
        let answered = async {
            let response = self.send(method, path, body).await?;
            let mut incoming = response.into_body();
            let mut bytes = BytesMut::new();
            while let Some(frame) = incoming.frame().await {
                if let Ok(data) = frame.context("read podman's answer")?.into_data() {
                    ensure!(
                        bytes.len() + data.len() <= MAX_RESPONSE_BYTES,
                        "podman's answer is longer than {MAX_RESPONSE_BYTES} bytes"
                    );
                    bytes.extend_from_slice(&data);
                }
            }
            Ok(bytes.freeze())
        };
        timeout(limit, answered)
            .await
            .with_context(|| format!("podman has not answered within {} s", limit.as_secs()))?
    }

    pub(super) async fn send(&self, method: Method, path: &str, body: Body) -> Result<Response<Incoming>> {
        let request = Request::builder().method(method).uri(format!("{API}{path}")).body(body);
        self.send_request(request.context("build a request to podman")?).await
    }

    /// Sends a request with a path of any API.
    pub(super) async fn send_request(&self, mut request: Request<Body>) -> Result<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .with_context(|| format!("connect to podman at {}", self.socket.display()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .with_context(|| format!("open an HTTP connection to podman at {}", self.socket.display()))?;
        // This task drives the connection. It ends with the request, or with the body of the answer.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection to podman ended: {error}");
            }
        });
        let headers = request.headers_mut();
        headers.insert("host", HeaderValue::from_static("podman"));
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        let response = sender.send_request(request).await.context("send a request to podman")?;
        let status = response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        let text = response.into_body().collect().await.context("read podman's error")?.to_bytes();
        Err(api_error(status, &text).into())
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

/// Parses `{"cause":"…","message":"…","response":500}`.
fn api_error(status: StatusCode, text: &[u8]) -> ApiError {
    let response: Option<Value> = serde_json::from_slice(text).ok();
    let message = response.as_ref().and_then(|response| response["message"].as_str());
    let message =
        message.map_or_else(|| format!("podman answers {status}"), |message| message.trim().to_owned());
    ApiError { status: status.as_u16(), message }
}

/// All characters except the unreserved ones (RFC 3986, 2.3).
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
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
    fn errors_contain_podmans_message() {
        let response =
            br#"{"cause":"no such image","message":"localhost/a:1: image not known","response":404}"#;
        let refused = api_error(StatusCode::NOT_FOUND, response);
        assert_eq!((refused.status, refused.to_string().as_str()), (404, "localhost/a:1: image not known"));
        assert_eq!(
            api_error(StatusCode::BAD_GATEWAY, b"<html>").to_string(),
            "podman answers 502 Bad Gateway"
        );
    }
}
