//! A client of podman's own REST API (libpod's) on a Unix socket. Because podman is another process,
//! containers outlive the agent, and the agent needs no permission to create containers itself.
//!
//! The client is written by hand. bollard implements Docker's API. Its closed lists of states lack some of
//! podman's, so one container can make a whole listing unreadable. podman-api has had no release since 2022.
//! [`http`] sends the requests, and [`documents`] has the fields that the agent reads.

mod documents;
mod http;
mod pull;
mod unresponsive;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_protocol::deployment::MAX_STOP_SECONDS;
use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::Method;
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::time::sleep;

use crate::device_state::short_id;
#[cfg(test)]
pub(crate) use documents::ListedPort;
use documents::{ContainerDetails, Image, Info, ListedVolume};
pub(crate) use documents::{ListedContainer, Mount};
use http::{ApiError, empty, encoded, read};

/// Time for most requests, on a busy Raspberry Pi or an emulated machine.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest wait for podman's clean-up after a container has ended. The process that cleans up may have been killed.
const CLEAN_UP: Duration = Duration::from_secs(20);
/// Time for starting a container. An emulated machine on a busy host has needed more than 30 s. Two minutes are
/// also the kubelet's default (`--runtime-request-timeout`).
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for loading an image archive onto a slow card.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
const SOCKET_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Time for stopping a container. Podman itself knows how long the container may take after its stop signal.
const STOP_TIMEOUT: Duration = REQUEST_TIMEOUT.saturating_add(Duration::from_secs(MAX_STOP_SECONDS as u64));
const CHUNK: usize = 256 << 10;

/// A client of podman. Each call uses a connection of its own, and fails if podman cannot be reached, does
/// not answer in time, or refuses the request ([`ApiError`]).
#[derive(Debug, Clone)]
pub(crate) struct Podman {
    socket: PathBuf,
}

impl Podman {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub(crate) fn has_socket(&self) -> bool {
        self.socket.exists()
    }

    /// Returns as soon as the socket exists.
    pub(crate) async fn wait_for_socket(&self) {
        while !self.has_socket() {
            sleep(SOCKET_POLL_INTERVAL).await;
        }
    }

    /// Lists the containers with this label, including ended ones.
    pub(crate) async fn containers(&self, label: &str) -> Result<Vec<ListedContainer>> {
        let path = format!("/containers/json?all=true&{}", filters(&json!({ "label": [label] })));
        self.get(&path).await.context("list the containers")
    }

    /// Lists all containers, including ended ones.
    pub(crate) async fn all_containers(&self) -> Result<Vec<ListedContainer>> {
        self.get("/containers/json?all=true").await.context("list the containers")
    }

    /// Lists the containers that podman's storage has and podman's database lacks.
    pub(crate) async fn storage_containers(&self) -> Result<Vec<ListedContainer>> {
        let listed = self.get("/containers/json?all=true&external=true").await;
        let mut listed: Vec<ListedContainer> = listed.context("list the containers in podman's storage")?;
        listed.retain(|container| container.state == "storage");
        Ok(listed)
    }

    /// Lists the volumes with this label.
    pub(crate) async fn volumes(&self, label: &str) -> Result<Vec<ListedVolume>> {
        let path = format!("/volumes/json?{}", filters(&json!({ "label": [label] })));
        let listed: Option<_> = self.get(&path).await.context("list the volumes")?;
        Ok(listed.unwrap_or_default())
    }

    /// Returns the image if podman has it.
    pub(crate) async fn image(&self, reference: &str) -> Result<Option<Image>> {
        let path = format!("/images/{}/json", encoded(reference));
        found(self.get(&path).await).with_context(|| format!("look for the image {reference}"))
    }

    pub(crate) async fn load(&self, archive: &Path) -> Result<()> {
        let file = tokio::fs::File::open(archive)
            .await
            .with_context(|| format!("open the image archive {}", archive.display()))?;
        let chunks = futures_util::stream::try_unfold(file, |mut file| async move {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let count = file.read_buf(&mut chunk).await?;
            Ok::<_, std::io::Error>((count > 0).then(|| (Frame::data(chunk.freeze()), file)))
        });
        let body = BodyExt::boxed(StreamBody::new(chunks));
        let loaded = self.call(Method::POST, "/images/load", body, LOAD_TIMEOUT).await;
        loaded.map(drop).with_context(|| format!("load the image archive {}", archive.display()))
    }

    /// Returns the controllers that containers of podman's user can have; `None` if podman does not tell, or if the
    /// device has cgroups v1, where users have no controllers of their own.
    pub(crate) async fn controllers(&self) -> Result<Option<Vec<String>>> {
        let info: Info = self.get("/info").await.context("ask for the cgroup controllers")?;
        Ok(info.host.controllers())
    }

    /// Creates a container and returns its id. `spec` is libpod's SpecGenerator.
    pub(crate) async fn create(&self, spec: &Value) -> Result<String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            id: String,
        }
        let created: Created = self.post("/containers/create", spec).await.context("create the container")?;
        Ok(created.id)
    }

    /// Starts a container. It is no error if it already runs (304).
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.command(id, "start", START_TIMEOUT).await.context("start the container")
    }

    /// Waits until podman has cleaned up after a container that has ended, at most [`CLEAN_UP`]. If such a container is
    /// started earlier, podman 4.3 keeps its network and forwards no ports to it.
    pub(crate) async fn wait_for_clean_up(&self, id: &str) -> Result<()> {
        self.command(id, "wait?condition=exited", CLEAN_UP).await.context("wait for the container's clean-up")
    }

    pub(crate) async fn unpause(&self, id: &str) -> Result<()> {
        self.command(id, "unpause", REQUEST_TIMEOUT).await.context("unpause the container")
    }

    pub(crate) async fn rename(&self, id: &str, name: &str) -> Result<()> {
        let rename = format!("rename?name={}", encoded(name));
        let renamed = self.command(id, &rename, REQUEST_TIMEOUT).await;
        renamed.with_context(|| format!("rename the container to {name}"))
    }

    async fn command(&self, id: &str, what: &str, limit: Duration) -> Result<()> {
        self.call(Method::POST, &format!("/containers/{id}/{what}"), empty(), limit).await.map(drop)
    }

    /// Returns the details of a container, if it exists.
    pub(crate) async fn details(&self, id: &str) -> Result<Option<ContainerDetails>> {
        found(self.get(&format!("/containers/{id}/json")).await).context("inspect the container")
    }

    /// Stops a container: podman sends the container's stop signal, and SIGKILL after its time. It is no error
    /// if the container does not run (304) or does not exist.
    pub(crate) async fn stop(&self, id: &str) -> Result<()> {
        let stopped = self.command(id, "stop", STOP_TIMEOUT).await;
        found(stopped).map(drop).with_context(|| format!("stop the container {}", short_id(id)))
    }

    /// Stops and deletes a container in one call. It is no error if the container does not exist.
    pub(crate) async fn remove(&self, container: &ListedContainer) -> Result<()> {
        let id = &container.id;
        // If podman ends while it stops a container, the container keeps running in the state `stopping`.
        // Before 4.4, podman deletes such a container without ending its process (podman#17040). So the
        // container is stopped first. If that fails, it is not deleted, since nothing would refer to its
        // process any more.
        let is_stopping = container.state == "stopping";
        if is_stopping {
            self.stop(id).await?;
        }
        // `volumes=true` deletes the anonymous volumes of the image that no other container uses. The named
        // volumes of a deployment stay.
        let path = format!("/containers/{id}?force=true&volumes=true");
        let limit = if is_stopping { REQUEST_TIMEOUT } else { STOP_TIMEOUT };
        self.delete(&path, limit).await.context("remove the container")
    }

    pub(crate) async fn create_volume(&self, name: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        let created = self.post::<Value>("/volumes/create", &json!({ "Name": name, "Label": labels })).await;
        created.map(drop).with_context(|| format!("create the volume {name}"))
    }

    /// Returns whether a volume of this name exists, with or without our label.
    pub(crate) async fn has_volume(&self, name: &str) -> Result<bool> {
        let volume: Result<Value> = self.get(&format!("/volumes/{}/json", encoded(name))).await;
        Ok(found(volume).with_context(|| format!("look for the volume {name}"))?.is_some())
    }

    /// Deletes an image that no container uses. It is no error if the image does not exist.
    pub(crate) async fn remove_image(&self, reference: &str) -> Result<()> {
        let path = format!("/images/{}", encoded(reference));
        self.delete(&path, REQUEST_TIMEOUT).await.with_context(|| format!("remove the image {reference}"))
    }

    /// Deletes an image that no container uses. Returns false if a container uses it.
    pub(crate) async fn remove_unused_image(&self, reference: &str) -> Result<bool> {
        let removed = self.remove_image(reference).await;
        let is_used = |error: &ApiError| error.status == 409;
        match removed {
            Err(error) if error.downcast_ref().is_some_and(is_used) => Ok(false),
            removed => removed.map(|()| true),
        }
    }

    /// Deletes a volume that no container uses. (With `force`, podman would delete the container too.)
    pub(crate) async fn remove_volume(&self, name: &str) -> Result<()> {
        let path = format!("/volumes/{}", encoded(name));
        self.delete(&path, REQUEST_TIMEOUT).await.with_context(|| format!("remove the volume {name}"))
    }

    /// Returns the last lines of a container's output.
    pub(crate) async fn logs(&self, id: &str, lines: u32) -> Result<Vec<String>> {
        let path = format!("/containers/{id}/logs?stdout=true&stderr=true&tail={lines}");
        let raw = self.call(Method::GET, &path, empty(), REQUEST_TIMEOUT).await;
        Ok(log_lines(&raw.context("read the container's output")?))
    }

    /// Calls `on_event` for each event of a container with this label, until podman ends the stream. The open
    /// connection keeps podman's service running. Without it, the service would end some time after the last
    /// request, and would have to start again for the next one.
    pub(crate) async fn events(&self, label: &str, mut on_event: impl FnMut()) -> Result<()> {
        let wanted = json!({ "type": ["container"], "label": [label] });
        let path = format!("/events?stream=true&{}", filters(&wanted));
        let response = self.send(Method::GET, &path, empty()).await.context("follow podman's events")?;
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.context("follow podman's events")?;
            on_event();
        }
        bail!("podman ended the event stream")
    }

    /// Deletes an object. It is no error if the object does not exist.
    async fn delete(&self, path: &str, limit: Duration) -> Result<()> {
        found(self.call(Method::DELETE, path, empty(), limit).await).map(drop)
    }

    async fn get<T: for<'de> Deserialize<'de>>(&self, path: &str) -> Result<T> {
        read(&self.call(Method::GET, path, empty(), REQUEST_TIMEOUT).await?)
    }

    async fn post<T: for<'de> Deserialize<'de>>(&self, path: &str, body: &Value) -> Result<T> {
        let body = Full::from(body.to_string()).map_err(|never| match never {}).boxed();
        read(&self.call(Method::POST, path, body, REQUEST_TIMEOUT).await?)
    }
}

/// Builds the part of a query that selects the wanted objects.
fn filters(wanted: &Value) -> String {
    format!("filters={}", encoded(&wanted.to_string()))
}

/// Returns whether podman itself has refused the request, in contrast to a podman that cannot be reached.
pub(crate) fn is_refusal(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<ApiError>())
}

/// Returns whether podman has refused a name because another container has it.
pub(crate) fn is_name_in_use(error: &anyhow::Error) -> bool {
    is_refusal(error) && format!("{error:#}").contains("already in use")
}

/// Turns an error with the status 404 into `None`.
fn found<T>(answer: Result<T>) -> Result<Option<T>> {
    answer.map(Some).or_else(|error| match error.downcast_ref() {
        Some(ApiError { status: 404, .. }) => Ok(None),
        _ => Err(error),
    })
}

/// Splits the output of a container into lines. The output has Docker's attach format: frames with the
/// stream's number, three zeros, a big-endian length and that many bytes.
fn log_lines(mut raw: &[u8]) -> Vec<String> {
    let mut text = HashMap::<u8, Vec<u8>>::new();
    let mut lines = Vec::new();
    while let [stream, 0, 0, 0, a, b, c, d, rest @ ..] = raw {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        let (data, rest) = rest.split_at(length.min(rest.len()));
        raw = rest;
        let partial = text.entry(*stream).or_default();
        for byte in data {
            if *byte == b'\n' {
                lines.push(String::from_utf8_lossy(partial).into_owned());
                partial.clear();
            } else {
                partial.push(*byte);
            }
        }
    }
    lines.extend(
        text.values().filter(|rest| !rest.is_empty()).map(|rest| String::from_utf8_lossy(rest).into_owned()),
    );
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_new_socket_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("podman.sock");
        let podman = Podman::new(&path);
        let begun = tokio::time::Instant::now();
        let appears = async {
            sleep(Duration::from_secs(3)).await;
            assert!(!podman.has_socket());
            std::fs::write(&path, "").unwrap();
        };
        tokio::join!(appears, podman.wait_for_socket());
        assert!(begun.elapsed() <= Duration::from_secs(3) + SOCKET_POLL_INTERVAL, "{:?}", begun.elapsed());
    }

    #[test]
    fn output_is_split_into_lines() {
        let frame = |stream: u8, text: &str| {
            [&[stream, 0, 0, 0][..], &(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
        };
        let raw = [frame(1, "one\ntw"), frame(2, "err\n"), frame(1, "o\nend")].concat();
        assert_eq!(log_lines(&raw), ["one", "err", "two", "end"]);
        assert_eq!(
            log_lines(&raw[..raw.len() - 2]).last().unwrap(),
            "e",
            "a truncated frame is read as far as it goes"
        );
        assert!(log_lines(b"").is_empty());
    }
}
