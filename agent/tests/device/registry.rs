//! A real registry (Debian's docker-registry) for one test, behind a proxy that can slow a download down or stop it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::pod;

/// The name of the registry in references of images.
const REGISTRY: &str = "registry.test";

pub(crate) struct Registry {
    directory: tempfile::TempDir,
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
}

impl Registry {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // The port is free now. Another process could bind it before the registry does, which then ends.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = directory.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            directory.path().join("data").display()
        );
        std::fs::write(&config, text).unwrap();
        let server = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.path().join("log")).unwrap())
            .spawn()
            .expect("start docker-registry; cargo xtask ci --fix installs it");
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { directory, server, address, line: Line::open(address) }
    }

    /// Returns podman's configuration (containers-registries.conf(5)), with which [`REGISTRY`] is this registry.
    pub(crate) fn configuration(&self) -> String {
        format!(
            "[[registry]]\nprefix = \"{REGISTRY}\"\nlocation = \"{}\"\ninsecure = true\n",
            self.line.address
        )
    }

    /// Makes an image of a layer of `bytes` random bytes and the program of the tests, and pushes it as
    /// `registry.test/NAME`.
    pub(crate) fn push(&self, name: &str, bytes: usize) -> String {
        let context = self.directory.path().join("context");
        std::fs::create_dir_all(&context).unwrap();
        std::fs::copy(pod::archives().join("context/program"), context.join("program")).unwrap();
        let mut random = vec![0; bytes];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        std::fs::write(context.join("random"), random).unwrap();
        let file = "FROM scratch\nCOPY program /program\nCOPY random /random\nENTRYPOINT [\"/program\"]\n";
        std::fs::write(context.join("Containerfile"), file).unwrap();
        pod::push(self.directory.path(), &context, &format!("{}/{name}", self.address));
        format!("{REGISTRY}/{name}")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
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
        });
        let of_thread = Arc::clone(&line);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                of_thread.connections.fetch_add(1, Ordering::SeqCst);
                of_thread.open.fetch_add(1, Ordering::SeqCst);
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
