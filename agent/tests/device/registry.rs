//! A real registry (Debian's docker-registry) for one test, behind a proxy that can slow a download down or stop it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::pod;

/// The name of the registry in references of images.
const REGISTRY: &str = "registry.test";

/// The login that [`Registry::require_login`] requires, and the file with its hash (htpasswd(1), bcrypt).
pub(crate) const LOGIN: &str = "pull:new-s3cret";
const USERS: &str = "pull:$2b$04$4yYtytJHyp1gx8EQaYv31Os99gTahfe5BYD80JRlKvrwy1XrRtgia\n";

pub(crate) struct Registry {
    pub(crate) directory: tempfile::TempDir,
    server: Child,
    address: SocketAddr,
    pub(crate) line: Arc<Line>,
}

/// The line between podman and the registry.
#[derive(Debug)]
pub(crate) struct Line {
    address: SocketAddr,
    /// The bytes that may still pass towards podman.
    pub(crate) allowed: AtomicU64,
    /// The bytes that may pass in a second.
    pub(crate) rate: AtomicU64,
    pub(crate) connections: AtomicUsize,
    pub(crate) open: AtomicUsize,
    /// True if a connection is closed when no more bytes may pass. Otherwise, it waits.
    pub(crate) cuts: AtomicBool,
    /// True if each request is answered with 429.
    pub(crate) refuses: AtomicBool,
}

/// The answer of a registry that has had too many requests (distribution specification). Podman would repeat its
/// request for a minute if the answer did not say when to do so.
const REFUSAL: &str = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Type: application/json\r\n\
                       Content-Length: 75\r\nConnection: close\r\n\r\n\
                       {\"errors\":[{\"code\":\"TOOMANYREQUESTS\",\"message\":\"slow down, device fleet\"}]}";

impl Registry {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The port is free now. Another process could bind it before the registry does, which then ends.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = serve(directory.path(), address, "");
        Self { directory, server, address, line: Line::open(address) }
    }

    /// Restarts the registry, which from now on requires [`LOGIN`].
    pub(crate) fn require_login(&mut self) {
        self.stop();
        let users = self.directory.path().join("users");
        std::fs::write(&users, USERS).unwrap();
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", users.display());
        self.server = serve(self.directory.path(), self.address, &auth);
    }

    /// Returns podman's configuration (containers-registries.conf(5)), with which [`REGISTRY`] is this registry.
    pub(crate) fn configuration(&self) -> String {
        let address = self.line.address;
        format!(
            "[[registry]]\nprefix = \"{REGISTRY}\"\nlocation = \"{address}\"\ninsecure = true\n\
             [[registry]]\nlocation = \"{address}\"\ninsecure = true\n"
        )
    }

    /// Returns the reference of an image of [`REGISTRY`] with the registry's address. Podman sends a login only to the
    /// registry that the reference names.
    pub(crate) fn direct(&self, reference: &str) -> String {
        reference.replacen(REGISTRY, &self.line.address.to_string(), 1)
    }

    /// Makes an image of a layer of `bytes` random bytes and the program of the tests, and pushes it as
    /// `registry.test/NAME`.
    pub(crate) fn push(&self, name: &str, bytes: usize) -> String {
        self.push_image(name, &[bytes], "")
    }

    /// Pushes an image with a layer of random bytes for each of these lengths. `words` are the arguments of its
    /// program.
    pub(crate) fn push_image(&self, name: &str, layers: &[usize], words: &str) -> String {
        let context = self.directory.path().join("context");
        std::fs::create_dir_all(&context).unwrap();
        std::fs::copy(pod::archives().join("context/program"), context.join("program")).unwrap();
        let mut file = "FROM scratch\nCOPY program /program\n".to_owned();
        for (index, bytes) in layers.iter().enumerate() {
            let mut random = vec![0; *bytes];
            std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
            std::fs::write(context.join(format!("random{index}")), random).unwrap();
            file += &format!("COPY random{index} /random{index}\n");
        }
        file += &format!("ENTRYPOINT [\"/program\"]\nCMD [{words}]\n");
        std::fs::write(context.join("Containerfile"), file).unwrap();
        pod::push(self.directory.path(), &context, &format!("{}/{name}", self.address), layers.len() > 1);
        format!("{REGISTRY}/{name}")
    }

    /// Returns the content of a layer of the image that was pushed last.
    pub(crate) fn layer(&self, index: usize) -> Vec<u8> {
        std::fs::read(self.directory.path().join(format!("context/random{index}"))).unwrap()
    }

    /// Stops the registry. Connections to it are closed at once.
    pub(crate) fn stop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

/// Starts a registry with more lines in its configuration, and waits until it listens.
fn serve(directory: &Path, address: SocketAddr, more: &str) -> Child {
    let config = directory.join("config.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n{more}",
        directory.join("data").display()
    );
    std::fs::write(&config, text).unwrap();
    let server = Command::new("docker-registry")
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(directory.join("log")).unwrap())
        .spawn()
        .expect("start docker-registry; cargo xtask ci --fix installs it");
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < deadline, "the registry does not listen");
        std::thread::sleep(Duration::from_millis(50));
    }
    server
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Reads a request and answers it with [`REFUSAL`].
fn refuse(mut client: TcpStream) {
    let mut request = [0; 4096];
    drop(client.read(&mut request));
    drop(client.write_all(REFUSAL.as_bytes()));
}

impl Line {
    fn open(registry: SocketAddr) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            allowed: AtomicU64::new(u64::MAX),
            rate: AtomicU64::new(u64::MAX),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            cuts: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&line);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                of_thread.connections.fetch_add(1, Ordering::SeqCst);
                of_thread.open.fetch_add(1, Ordering::SeqCst);
                if of_thread.refuses.load(Ordering::SeqCst) {
                    refuse(client);
                    continue;
                }
                let Ok(server) = TcpStream::connect(registry) else { continue };
                let (line, from, to) =
                    (Arc::clone(&of_thread), client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    drop(std::io::copy(&mut &from, &mut &to));
                    drop(to.shutdown(Shutdown::Both));
                    line.open.fetch_sub(1, Ordering::SeqCst);
                });
                let line = Arc::clone(&of_thread);
                std::thread::spawn(move || line.pass(server, client));
            }
        });
        line
    }

    /// Passes the registry's answer on, at most as fast and as long as allowed.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = [0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            while self.allowed.load(Ordering::SeqCst) < count as u64 {
                if self.cuts.load(Ordering::SeqCst) {
                    drop(to.shutdown(Shutdown::Both));
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            self.allowed.fetch_sub(count as u64, Ordering::SeqCst);
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
            let rate = self.rate.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
        }
        drop(to.shutdown(Shutdown::Both));
    }
}
