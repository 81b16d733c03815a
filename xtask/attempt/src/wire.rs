//! The protocol between this host and the first process of the guest. A virtio-serial port carries it in both
//! directions. A message is a frame: one byte for its kind, the length of its content as a little-endian `u32`, and the
//! content. `guest/main.rs` compiles this file too, so it uses only the standard library.

use std::io::{self, Read, Write};

/// The greatest length of a frame's content in bytes. The driver of the port writes at most 32 KiB at once.
pub const MOST: usize = 32 * 1024 - 5;

/// The greatest length that a receiver accepts. A job with its arguments and its environment is one frame, and Linux
/// limits both together to 6 MiB (execve(2)).
const LONGEST: usize = 8 << 20;

/// The kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the guest: the job, see [`Job`].
    Job = b'J' as isize,
    /// To the guest: a part of the program's standard input. An empty part is its end.
    Input = b'I' as isize,
    /// To the guest: the program's standard output has no reader any more. The content is empty.
    Closed = b'C' as isize,
    /// To the host: the program starts now. The content describes the kernel.
    Started = b'S' as isize,
    /// To the host: a part of the program's standard output.
    Output = b'O' as isize,
    /// To the host: a part of the program's standard error.
    Error = b'E' as isize,
    /// To the host: the program has ended, see [`End`]. No output follows.
    End = b'X' as isize,
    /// To the host: the machine cannot run the program. The content is the reason.
    Failed = b'F' as isize,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        use Kind::{Closed, End, Error, Failed, Input, Job, Output, Started};
        [Job, Input, Closed, Started, Output, Error, End, Failed].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Writes a frame with one call, so that two writers that share a lock do not mix frames.
///
/// # Errors
/// Returns the error of the write.
pub fn send(to: &mut impl Write, kind: Kind, content: &[u8]) -> io::Result<()> {
    let length = u32::try_from(content.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(5 + content.len());
    frame.push(kind as u8);
    frame.extend(length.to_le_bytes());
    frame.extend(content);
    to.write_all(&frame)
}

/// Reads a frame.
///
/// # Errors
/// Returns an error of kind `UnexpectedEof` if the stream ends, and an error if the bytes are no frame.
pub fn receive(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let kind = Kind::of(head[0]).filter(|_| length <= LONGEST);
    let kind = kind.ok_or_else(|| io::Error::other(format!("the bytes {head:?} begin no frame")))?;
    let mut content = vec![0; length];
    from.read_exact(&mut content)?;
    Ok((kind, content))
}

/// The program to run, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Job {
    /// The time of the host, in seconds since 1970.
    pub time: u64,
    /// The file system below the program's: `share` is the 9p share of this name, `disk` is a partition of the disk,
    /// and an empty word stands for no file system.
    pub root: String,
    /// The directory at which the guest mounts the share with the program; empty if there is no such share.
    pub share: String,
    /// The working directory. The guest makes it if it is missing.
    pub directory: Vec<u8>,
    /// The path of the program.
    pub program: Vec<u8>,
    /// The variables of the environment, as `NAME=VALUE`.
    pub environment: Vec<Vec<u8>>,
    /// The arguments. The first one is the program's own name.
    pub arguments: Vec<Vec<u8>>,
    /// The user that runs the program.
    pub user: User,
}

/// A user with its groups, by their numbers. The default is root.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct User {
    pub id: u32,
    pub group: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    fn encode(&self) -> String {
        let numbers = [self.id, self.group].into_iter().chain(self.groups.iter().copied());
        numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" ")
    }

    fn decode(text: &str) -> Option<Self> {
        let numbers: Option<Vec<u32>> = text.split(' ').map(|number| number.parse().ok()).collect();
        let numbers = numbers?;
        let (id, group) = (*numbers.first()?, *numbers.get(1)?);
        Some(Self { id, group, groups: numbers[2..].to_vec() })
    }
}

impl Job {
    /// Returns the content of the frame: each field with a final zero. No field can contain a zero, because execve(2)
    /// ends each string with one.
    pub fn encode(&self) -> Vec<u8> {
        let time = self.time.to_string();
        let variables = self.environment.len().to_string();
        let user = self.user.encode();
        let words = [&time, &self.root, &self.share, &user].map(String::as_bytes);
        let mut fields = words.to_vec();
        fields.extend([&*self.directory, &*self.program, variables.as_bytes()]);
        fields.extend(self.environment.iter().chain(&self.arguments).map(Vec::as_slice));
        fields.into_iter().flat_map(|field| field.iter().copied().chain([0])).collect()
    }

    /// Reads the content of a frame; `None` if it is not complete.
    pub fn decode(content: &[u8]) -> Option<Self> {
        let mut fields = content.strip_suffix(&[0])?.split(|byte| *byte == 0).map(<[u8]>::to_vec);
        let mut text = || String::from_utf8(fields.next()?).ok();
        let (time, root, share) = (text()?.parse().ok()?, text()?, text()?);
        let user = User::decode(&text()?)?;
        let (directory, program) = (fields.next()?, fields.next()?);
        let variables: usize = String::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let environment: Vec<_> = fields.by_ref().take(variables).collect();
        let arguments: Vec<_> = fields.collect();
        let complete = environment.len() == variables && !arguments.is_empty();
        complete.then_some(Self { time, root, share, directory, program, environment, arguments, user })
    }
}

/// The end of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The program ended with this exit code.
    Exit(u8),
    /// This signal ended the program.
    Signal(u8),
    /// The kernel killed the program because the machine's memory was full.
    Starved,
    /// The kernel did not execute the program, with this error number (errno(3)).
    Refused(i32),
}

impl End {
    /// Returns the content of the frame.
    pub fn encode(self) -> String {
        match self {
            Self::Exit(code) => format!("exit {code}"),
            Self::Signal(number) => format!("signal {number}"),
            Self::Starved => "starved 0".to_owned(),
            Self::Refused(number) => format!("refused {number}"),
        }
    }

    /// Reads the content of a frame; `None` if it is none.
    pub fn decode(content: &[u8]) -> Option<Self> {
        let (word, number) = std::str::from_utf8(content).ok()?.split_once(' ')?;
        Some(match word {
            "exit" => Self::Exit(number.parse().ok()?),
            "signal" => Self::Signal(number.parse().ok()?),
            "starved" => Self::Starved,
            "refused" => Self::Refused(number.parse().ok()?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_the_same_on_both_sides() {
        let job = Job {
            time: 7,
            root: String::new(),
            share: "/try".to_owned(),
            directory: b"/try".to_vec(),
            program: b"/try/a\xff".to_vec(),
            environment: vec![b"A=1=2".to_vec(), b"B=".to_vec()],
            arguments: vec![b"a".to_vec(), Vec::new(), b"c d\n".to_vec()],
            user: User { id: 1000, group: 50, groups: vec![4, 5] },
        };
        let content = job.encode();
        assert_eq!(Job::decode(&content).as_ref(), Some(&job));
        assert_eq!(Job::decode(&content[..content.len() - 1]), None);
        let nameless = [&b"7\0\0\0"[..], b"0 0\0/\0/a\0", b"1\0A=1\0"].concat();
        assert_eq!(Job::decode(&nameless), None, "without the program's name");
        assert!(Job::decode(&[&nameless[..], b"a\0"].concat()).is_some());
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let mut stream = Vec::new();
        send(&mut stream, Kind::Output, b"text").unwrap();
        send(&mut stream, Kind::End, End::Signal(4).encode().as_bytes()).unwrap();
        let mut from = &stream[..];
        assert_eq!(receive(&mut from).unwrap(), (Kind::Output, b"text".to_vec()));
        let (kind, content) = receive(&mut from).unwrap();
        assert_eq!((kind, End::decode(&content)), (Kind::End, Some(End::Signal(4))));
        assert_eq!(receive(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(receive(&mut &b"?\0\0\0\0"[..]).is_err(), "an unknown kind");
        assert!(receive(&mut &b"O\xff\xff\xff\xff"[..]).is_err(), "a frame of 4 GiB");
    }
}
