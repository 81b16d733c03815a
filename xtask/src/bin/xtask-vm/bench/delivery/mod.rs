//! `cargo xtask bench delivery`: measures four ways to deliver a new agent into a booted guest, as a warm smoke must.
//! The guest runs under bare QEMU. The ways are a disk that is attached from the start and filled at the delivery, a
//! disk that is plugged in at the delivery, HTTP over the user network, and ssh. A warm smoke uses the first one. The
//! measured time begins with the delivery and ends when the guest reports that the whole executable is in its memory.
//! A command in the guest waits for the content before the delivery begins; for ssh, sshd waits. The content that
//! arrives is compared by its digest.

mod guest;

use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use xtask_core::digest::Algorithm;
use xtask_core::error::Failure;
use xtask_core::format::human_bytes;
use xtask_core::host::tools;
use xtask_core::limits;

use super::bare::Bare;
use super::{Bench, listed, median, rounded, timed};
use crate::guest::monitor::Qmp;
use guest::{DELIVERED, DeliveryGuest};

/// The disk that is attached from the start, after the guest's own disk and its seed.
const THERE: &str = "/dev/vdc";
/// The hot-plugged disk.
const PLUGGED: &str = "/dev/vdd";
/// The address of this host in the guest's user network (QEMU, "Network emulation").
const HOST: &str = "10.0.2.2";

/// A way to deliver the content. A warm smoke uses the first one of [`WAYS`].
struct Way {
    name: &'static str,
    deliver: fn(&DeliveryGuest<'_>) -> Result<f64>,
}

const WAYS: [Way; 4] = [
    Way { name: "disk attached from the start", deliver: |guest| guest.by_disk() },
    Way { name: "hot-plugged disk", deliver: |guest| guest.by_plugging() },
    Way { name: "HTTP over the user network", deliver: |guest| guest.by_http() },
    Way { name: "ssh", deliver: |guest| guest.by_ssh() },
];

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let mut content = bench.agent()?.content;
    // The size of a disk is a multiple of the sector size.
    content.resize(content.len().next_multiple_of(4096), 0);
    let seconds = bench.with_image(|plan, image| {
        let bare = Bare { bench, plan, image, cpu: &plan.cpu.describe() };
        bare.in_a_run(|run| {
            let guest = bench.step("delivery boot", "boot", || {
                Ok((DeliveryGuest::boot(&bare, run, &content)?, "bare QEMU".to_owned()))
            })?;
            guest.measure(bench)
        })
    })?;
    conclude(bench, content.len(), &seconds)
}

impl DeliveryGuest<'_> {
    /// Measures each way in turn, in each round. One more round comes first and is discarded, so that no figure
    /// includes the first read of the programs and the content.
    fn measure(&self, bench: &Bench<'_>) -> Result<Vec<(&'static str, Vec<f64>)>> {
        let mut all = WAYS.map(|way| (way.name, Vec::new()));
        for number in 0..=bench.args.rounds {
            for (Way { name, deliver }, (_, seconds)) in WAYS.iter().zip(&mut all) {
                let took = bench.step(&format!("delivery by {name}"), "deliver", || {
                    let took = self.deliver(*deliver).with_context(|| format!("deliver by {name}"))?;
                    Ok((took, format!("round {number}: {name} {took:.2} s")))
                })?;
                if number > 0 {
                    seconds.push(took);
                }
            }
        }
        Ok(all.into())
    }

    fn deliver(&self, by: fn(&Self) -> Result<f64>) -> Result<f64> {
        let seconds = by(self)?;
        let output = self.root(&format!("sha256sum {DELIVERED}"))?;
        self.root(&format!("rm {DELIVERED}"))?;
        came(&output, self.content)?;
        Ok(seconds)
    }

    fn by_disk(&self) -> Result<f64> {
        // The seed of a snapshot waits in the same way.
        let wait = format!("until {{ read -r first < {THERE}; [ -n \"$first\" ]; }}; do sleep 0.1; done");
        let waiting = self.waiting(&format!("{wait}; cat {THERE}"))?;
        let disk = File::options().write(true).open(&self.there).context("open the guest's disk")?;
        let ((), seconds) = timed(|| {
            disk.write_all_at(self.content, 0).context("write the guest's disk")?;
            waiting.delivered()
        })?;
        let mut blank = vec![0; self.content.len()];
        blank[0] = b'\n';
        disk.write_all_at(&blank, 0).context("blank the guest's disk")?;
        Ok(seconds)
    }

    fn by_plugging(&self) -> Result<f64> {
        let mut qmp = Qmp::connect(&self.qmp, limits::QMP_ANSWER)?;
        let waiting = self.waiting(&format!("until [ -b {PLUGGED} ]; do sleep 0.1; done; cat {PLUGGED}"))?;
        let device = json!({ "driver": "virtio-blk-pci", "id": "late", "drive": "late", "bus": "free" });
        let ((), seconds) = timed(|| qmp.ask("device_add", &device).and_then(|_| waiting.delivered()))?;
        qmp.ask("device_del", &json!({ "id": "late" }))?;
        qmp.until("DEVICE_DELETED")?;
        Ok(seconds)
    }

    fn by_http(&self) -> Result<f64> {
        // The port refuses connections until the delivery begins, so that the measured time includes the guest's
        // connection. A restored guest must connect too, since no connection survives the saving of a snapshot.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into()).context("take a port of loopback")?;
        let listener = TcpListener::from(socket.try_clone()?);
        let port = listener.local_addr().context("take a port of loopback")?.port();
        // bash reads the header's lines byte by byte, and leaves the body to cat. No HTTP client of a distribution
        // starts faster.
        let waiting = self.waiting(&format!(
            "until {{ exec 3<>/dev/tcp/{HOST}/{port}; }} 2> /dev/null; do sleep 0.1; done; \
             printf \"GET / HTTP/1.0\\r\\n\\r\\n\" >&3; \
             while read -r line <&3 && [ ${{#line}} -gt 1 ]; do :; done; cat <&3"
        ))?;
        let started = Instant::now();
        socket.listen(1).context("listen on loopback")?;
        listener.set_nonblocking(true).context("listen on loopback")?;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => waiting.look()?,
                Err(error) => return Err(error).context("accept the guest's connection"),
            }
        };
        self.answer(&stream).context("answer the guest")?;
        drop(stream);
        waiting.delivered()?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Answers like a server of HTTP/1.0 (RFC 1945): the content ends with the connection.
    fn answer(&self, mut stream: &TcpStream) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(limits::QMP_ANSWER))?;
        stream.set_write_timeout(Some(limits::DELIVERY))?;
        let mut request = BufReader::new(stream);
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            ensure!(request.read_line(&mut line)? > 0, "the guest sent no request");
        }
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", self.content.len())?;
        stream.write_all(self.content)?;
        Ok(())
    }

    fn by_ssh(&self) -> Result<f64> {
        let content = File::open(&self.full).context("open the content")?;
        let mut command = Command::new(tools::require("ssh")?);
        command.args(self.keys.arguments(self.port));
        command.arg(format!("sudo -n timeout {} sh -c 'cat > {DELIVERED}'", limits::DELIVERY.as_secs()));
        command.stdin(Stdio::from(content));
        let (status, seconds) = timed(|| command.status().context("run ssh"))?;
        self.ui.check()?;
        ensure!(status.success(), "ssh: {status}");
        Ok(seconds)
    }
}

/// Returns an error if the output of `sha256sum` does not have the digest of the content.
fn came(output: &str, content: &[u8]) -> Result<()> {
    let expected = Algorithm::Sha256.of(content);
    let expected = expected.hex();
    let got = output.split_whitespace().next().unwrap_or_default();
    ensure!(got == expected, "the guest received other content: its SHA-256 is {got:?}, expected {expected}");
    Ok(())
}

/// Prints the figures. Returns an error if another way is so much faster that a smoke should use it instead.
fn conclude(bench: &Bench<'_>, bytes: usize, seconds: &[(&str, Vec<f64>)]) -> Result<()> {
    let (arch, rounds) = (bench.args.arch, bench.args.rounds);
    let medians: Vec<_> = seconds.iter().map(|(way, all)| (*way, median(all))).collect();
    let (_, ours) = *medians.first().context("no way was measured")?;
    let ways = seconds.iter().map(|(way, all)| json!({ "way": way, "seconds": rounded(all) }));
    let ways: Vec<_> = ways.collect();
    let figures = json!({ "schema": 1, "subject": "delivery", "arch": arch, "bytes": bytes, "ways": ways });
    let size = human_bytes(bytes as u64);
    let mut lines = vec![format!("{size} into a booted {arch} guest, {rounds} round(s)")];
    lines.extend(
        seconds.iter().map(|(way, all)| {
            format!("  {way:<28} {} s, {:.1} times ours", listed(all, 2), median(all) / ours)
        }),
    );
    bench.print(&figures, lines.join("\n"))?;
    ours_will_do(&medians)
}

fn ours_will_do(medians: &[(&str, f64)]) -> Result<()> {
    let (_, ours) = *medians.first().context("no way was measured")?;
    let worth = limits::WORTH_ANOTHER_DELIVERY.as_secs_f64();
    let Some((way, theirs)) = medians.iter().find(|(_, theirs)| ours - theirs > worth) else { return Ok(()) };
    let error = format!("{way} takes {theirs:.2} s, but the delivery of a warm smoke takes {ours:.2} s");
    let hint = "check that nothing else runs on this machine; if so, use the faster delivery in \
                src/bin/xtask-vm/smoke/warm.rs";
    Err(Failure::guest(error, hint).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_is_what_was_sent() {
        let digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        came(&format!("{digest}  {DELIVERED}\n"), b"hello").unwrap();
        for other in [format!("{digest}  {DELIVERED}\n").replace("2cf", "2ce"), String::new()] {
            assert!(came(&other, b"hello").unwrap_err().to_string().contains("other content"), "{other}");
        }
    }

    #[test]
    fn a_way_that_is_much_faster_is_a_failure() {
        let [disk, plugged, http, ssh] = WAYS.map(|way| way.name);
        ours_will_do(&[(disk, 0.25), (plugged, 0.4), (http, 0.2), (ssh, 3.0)]).unwrap();
        let error = ours_will_do(&[(disk, 0.5), (plugged, 0.2), (ssh, 3.0)]).unwrap_err();
        assert!(error.to_string().contains("hot-plugged disk takes 0.20 s"), "{error:#}");
    }
}
