//! podman, through its own REST API (libpod's) on a Unix socket: containers outlive the agent, and the agent needs none of the
//! rights that making one takes.
//!
//! Which library: bollard is kept, but speaks Docker's dialect, whose closed lists of states podman's answers leave (a whole
//! listing is then lost over one container), and podman-api has had no release since 2022. hyper carries the requests; the few
//! documents are in [`documents`], with those fields alone that the agent reads; [`http`] carries the requests.

mod documents;
mod http;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::BytesMut;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::Method;
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::time::sleep;

pub use documents::{Image, ListedContainer, ListedVolume};
pub use http::ApiError;
use http::{Socket, empty, encoded, read};

/// An answer to a question, on a Pi that is busy or a machine that is emulated.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// An image out of a registry, over a slow line.
const PULL_TIMEOUT: Duration = Duration::from_secs(1800);
/// An image out of an archive, onto a slow card.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);
/// How often a socket that is not there is looked for.
const SOCKET_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Seconds that a container has between SIGTERM and SIGKILL.
const STOP_SECONDS: u64 = 10;
const CHUNK: usize = 256 << 10;

/// A way to podman; each call is a connection of its own.
#[derive(Debug, Clone)]
pub struct Podman {
    socket: Socket,
}

impl Podman {
    /// Behind `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: Socket::new(socket) }
    }

    /// Whether there is a socket to ask at all; one that is there may still refuse.
    pub fn is_there(&self) -> bool {
        self.socket.exists()
    }

    /// Once there is one: looking costs next to nothing, and is no question to anybody.
    pub async fn appears(&self) {
        while !self.is_there() {
            sleep(SOCKET_POLL_INTERVAL).await;
        }
    }

    /// The containers with this label, ended ones too.
    ///
    /// # Errors
    /// As every call here: where podman cannot be reached, does not answer in time, or refuses ([`ApiError`]).
    pub async fn containers(&self, label: &str) -> Result<Vec<ListedContainer>> {
        let filters = json!({ "label": [label] });
        self.get(&format!("/containers/json?all=true&filters={}", encoded(&filters.to_string())))
            .await
            .context("list the containers")
    }

    /// The volumes with this label.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn volumes(&self, label: &str) -> Result<Vec<ListedVolume>> {
        let filters = json!({ "label": [label] });
        let listed: Option<_> = self
            .get(&format!("/volumes/json?filters={}", encoded(&filters.to_string())))
            .await
            .context("list the volumes")?;
        Ok(listed.unwrap_or_default())
    }

    /// The image of this reference, where it is here.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn image(&self, reference: &str) -> Result<Option<Image>> {
        let path = format!("/images/{}/json", encoded(reference));
        found(self.get(&path).await).with_context(|| format!("look for the image {reference}"))
    }

    /// Loads an archive of images.
    ///
    /// # Errors
    /// Names the archive; see [`Podman::containers`].
    pub async fn load(&self, archive: &Path) -> Result<()> {
        let file = tokio::fs::File::open(archive)
            .await
            .with_context(|| format!("open the image archive {}", archive.display()))?;
        let chunks = futures_util::stream::try_unfold(file, |mut file| async move {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let count = file.read_buf(&mut chunk).await?;
            Ok::<_, std::io::Error>((count > 0).then(|| (Frame::data(chunk.freeze()), file)))
        });
        let body = BodyExt::boxed(StreamBody::new(chunks));
        self.socket
            .call(Method::POST, "/images/load", body, LOAD_TIMEOUT)
            .await
            .map(drop)
            .with_context(|| format!("load the image archive {}", archive.display()))
    }

    /// Brings an image from its registry. Podman answers 200 at once and tells how it went in the lines that follow.
    ///
    /// # Errors
    /// Names the image; see [`Podman::containers`].
    pub async fn pull(&self, reference: &str) -> Result<()> {
        let path = format!("/images/pull?reference={}", encoded(reference));
        let pulled = async {
            let response = self.socket.call(Method::POST, &path, empty(), PULL_TIMEOUT).await?;
            let lines = response
                .split(|byte| *byte == b'\n')
                .filter_map(|line| serde_json::from_slice::<Value>(line).ok());
            let error = lines.filter_map(|line| line["error"].as_str().map(str::to_owned)).next_back();
            match error {
                Some(error) => bail!("{error}"),
                None => Ok(()),
            }
        };
        pulled.await.with_context(|| format!("pull the image {reference}"))
    }

    /// Makes a container; its id. `spec` is libpod's SpecGenerator.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn create(&self, spec: &Value) -> Result<String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            id: String,
        }
        let created: Created = self.post("/containers/create", spec).await.context("make the container")?;
        Ok(created.id)
    }

    /// Starts a container; one that runs already is fine (304).
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn start(&self, id: &str) -> Result<()> {
        self.command(id, "start").await.context("start the container")
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn unpause(&self, id: &str) -> Result<()> {
        self.command(id, "unpause").await.context("let the paused container go on")
    }

    /// Gives a container this name.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn rename(&self, id: &str, name: &str) -> Result<()> {
        self.command(id, &format!("rename?name={}", encoded(name)))
            .await
            .with_context(|| format!("give the container its name {name} back"))
    }

    async fn command(&self, id: &str, what: &str) -> Result<()> {
        self.socket
            .call(Method::POST, &format!("/containers/{id}/{what}"), empty(), REQUEST_TIMEOUT)
            .await
            .map(drop)
    }

    /// Stops and deletes a container; one that is gone already is fine. One call does both: podman asks it to end, and kills it
    /// after [`STOP_SECONDS`].
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn remove(&self, container: &ListedContainer) -> Result<()> {
        let (id, patience) = (&container.id, REQUEST_TIMEOUT + Duration::from_secs(STOP_SECONDS));
        // A podman that ended while it stopped one leaves it so, running; before 4.4 it deletes such a one without ending it
        // (podman#17040). Where it does not stop, it is not deleted: nobody would know of it any more.
        if container.state == "stopping" {
            let stop = format!("/containers/{id}/stop?timeout={STOP_SECONDS}");
            let stopped = self.socket.call(Method::POST, &stop, empty(), patience).await;
            found(stopped).with_context(|| format!("stop the container {id}"))?;
        }
        // Volumes that the image wants and nobody named; ours have names and stay.
        let path = format!("/containers/{id}?force=true&volumes=true&timeout={STOP_SECONDS}");
        let removed = self.socket.call(Method::DELETE, &path, empty(), patience).await;
        found(removed).map(drop).context("remove the container")
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// Names the volume; see [`Podman::containers`].
    pub async fn create_volume(&self, name: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        let body = json!({ "Name": name, "Label": labels });
        self.post::<Value>("/volumes/create", &body)
            .await
            .map(drop)
            .with_context(|| format!("make the volume {name}"))
    }

    /// Deletes an image, and what it is also called.
    ///
    /// # Errors
    /// Names the image; see [`Podman::containers`].
    pub async fn remove_image(&self, reference: &str) -> Result<()> {
        let path = format!("/images/{}", encoded(reference));
        let removed = self.socket.call(Method::DELETE, &path, empty(), REQUEST_TIMEOUT).await;
        found(removed).map(drop).with_context(|| format!("remove the image {reference}"))
    }

    /// Deletes a volume and what is in it; not one that somebody uses, whose container podman would delete with it.
    ///
    /// # Errors
    /// Names the volume; see [`Podman::containers`].
    pub async fn remove_volume(&self, name: &str) -> Result<()> {
        let path = format!("/volumes/{}", encoded(name));
        let removed = self.socket.call(Method::DELETE, &path, empty(), REQUEST_TIMEOUT).await;
        found(removed).map(drop).with_context(|| format!("remove the volume {name}"))
    }

    /// The last lines of a container's output.
    ///
    /// # Errors
    /// See [`Podman::containers`].
    pub async fn logs(&self, id: &str, lines: u32) -> Result<Vec<String>> {
        let path = format!("/containers/{id}/logs?stdout=true&stderr=true&tail={lines}");
        let raw = self
            .socket
            .call(Method::GET, &path, empty(), REQUEST_TIMEOUT)
            .await
            .context("read the container's output")?;
        Ok(log_lines(&raw))
    }

    /// Calls `happened` each time that something happens to a container with this label. The connection keeps podman's service
    /// awake, which otherwise ends after a while and is started again for the next question.
    ///
    /// # Errors
    /// Where podman cannot be reached, or ends the stream.
    pub async fn events(&self, label: &str, mut happened: impl FnMut()) -> Result<()> {
        let filters = json!({ "type": ["container"], "label": [label] });
        let path = format!("/events?stream=true&filters={}", encoded(&filters.to_string()));
        let response =
            self.socket.send(Method::GET, &path, empty()).await.context("follow podman's events")?;
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.context("follow podman's events")?;
            happened();
        }
        bail!("podman ended the stream of events")
    }

    async fn get<T: for<'de> Deserialize<'de>>(&self, path: &str) -> Result<T> {
        read(&self.socket.call(Method::GET, path, empty(), REQUEST_TIMEOUT).await?)
    }

    async fn post<T: for<'de> Deserialize<'de>>(&self, path: &str, body: &Value) -> Result<T> {
        let body = Full::from(body.to_string()).map_err(|never| match never {}).boxed();
        read(&self.socket.call(Method::POST, path, body, REQUEST_TIMEOUT).await?)
    }
}

/// What is not there is no error.
fn found<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.downcast_ref::<ApiError>().is_some_and(|refused| refused.status == 404) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Output comes in frames: the stream's number, three zeros, a big-endian length, that many bytes (Docker's attach format).
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
    async fn a_socket_is_seen_as_soon_as_it_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("podman.sock");
        let podman = Podman::new(&path);
        let begun = tokio::time::Instant::now();
        let appears = async {
            sleep(Duration::from_secs(3)).await;
            assert!(!podman.is_there());
            std::fs::write(&path, "").unwrap();
        };
        tokio::join!(appears, podman.appears());
        assert!(begun.elapsed() <= Duration::from_secs(3) + SOCKET_POLL_INTERVAL, "{:?}", begun.elapsed());
    }

    #[test]
    fn output_is_taken_out_of_its_frames() {
        let frame = |stream: u8, text: &str| {
            [&[stream, 0, 0, 0][..], &(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
        };
        let raw = [frame(1, "one\ntw"), frame(2, "err\n"), frame(1, "o\nend")].concat();
        assert_eq!(log_lines(&raw), ["one", "err", "two", "end"]);
        assert_eq!(
            log_lines(&raw[..raw.len() - 2]).last().unwrap(),
            "e",
            "a torn end is told as far as it goes"
        );
        assert!(log_lines(b"").is_empty());
    }
}
