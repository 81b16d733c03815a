//! The user of a container image: a name or a number, looked up in the image's own `/etc/passwd` and `/etc/group`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use xtask_archives::resolve;

use crate::wire::User;

/// The bytes of an account file that are read. Images have a few kilobytes.
const MOST: u64 = 1 << 20;

/// The user of a container, and its home directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) user: User,
    pub(crate) home: String,
}

impl Account {
    /// Returns the account for the user of an image's configuration: `NAME`, `ID`, `NAME:GROUP` or `ID:ID`. An empty
    /// word is root. As in podman, a number need not be in the files, and its group is then 0.
    ///
    /// # Errors
    /// Returns a sentence if a name is not in the image.
    pub(crate) fn of(word: &str, root: &Path) -> Result<Self, String> {
        let (user, group) = word.split_once(':').unwrap_or((word, ""));
        let user = if user.is_empty() { "0" } else { user };
        let passwd = lines(root, "/etc/passwd")?;
        let found = passwd.iter().find(|fields| is_named(fields, user));
        let number = |fields: &Vec<String>, at: usize| fields.get(at).and_then(|text| text.parse().ok());
        let id = user.parse().ok().or_else(|| number(found?, 2));
        let id: u32 = id.ok_or_else(|| format!("its user is {user}, which its /etc/passwd does not have"))?;
        let groups = lines(root, "/etc/group")?;
        let group = match group {
            "" => found.and_then(|fields| number(fields, 3)).unwrap_or(0),
            name => {
                let found = groups.iter().find(|fields| is_named(fields, name));
                let id = name.parse().ok().or_else(|| number(found?, 2));
                id.ok_or_else(|| format!("its group is {name}, which its /etc/group does not have"))?
            }
        };
        let name = found.and_then(|fields| fields.first()).cloned();
        let is_member = |fields: &&Vec<String>| {
            let members = fields.get(3).map(String::as_str).unwrap_or_default();
            name.as_deref().is_some_and(|name| members.split(',').any(|member| member == name))
        };
        // A group in the configuration replaces all groups of the user.
        let others = groups.iter().filter(|_| !word.contains(':')).filter(is_member);
        let groups = others.filter_map(|fields| number(fields, 2)).collect();
        let home = found.and_then(|fields| fields.get(5)).filter(|home| !home.is_empty());
        let home = home.cloned().unwrap_or_else(|| if id == 0 { "/root" } else { "/" }.to_owned());
        Ok(Self { user: User { id, group, groups }, home })
    }
}

/// Returns whether the fields of a line have this name or number.
fn is_named(fields: &[String], word: &str) -> bool {
    let has = |at: usize| fields.get(at).is_some_and(|field| field == word);
    has(0) || has(2)
}

/// Returns the fields of each line of an account file (passwd(5), group(5)). A file that is missing has no lines.
fn lines(root: &Path, path: &str) -> Result<Vec<Vec<String>>, String> {
    let found = resolve(root, Path::new(path)).map_err(|error| format!("its {path}: {error}"))?;
    let Some(found) = found.map(|found| root.join(found)).filter(|found| found.is_file()) else {
        return Ok(Vec::new());
    };
    let mut bytes = Vec::new();
    let read = File::open(&found).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
    read.map_err(|error| format!("its {path}: {error}"))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_looked_up_in_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir_all(root.join("usr/etc")).unwrap();
        // On this host, the link would lead to the host's own accounts.
        std::os::unix::fs::symlink("/usr/etc", root.join("etc")).unwrap();
        std::fs::write(
            root.join("usr/etc/passwd"),
            "root:x:0:0::/root:/bin/sh\napp:x:1000:50:The app:/srv:/bin/sh\nbare:x:1001:51\n",
        )
        .unwrap();
        std::fs::write(
            root.join("usr/etc/group"),
            "root:x:0:\nstaff:x:50:\nvideo:x:44:root,app\ntty:x:5:app\n",
        )
        .unwrap();
        let account = |id, group, groups: &[u32], home: &str| Account {
            user: User { id, group, groups: groups.to_vec() },
            home: home.to_owned(),
        };
        let table = [
            ("", account(0, 0, &[44], "/root")),
            ("root", account(0, 0, &[44], "/root")),
            ("app", account(1000, 50, &[44, 5], "/srv")),
            ("1000", account(1000, 50, &[44, 5], "/srv")),
            ("app:video", account(1000, 44, &[], "/srv")),
            ("app:7", account(1000, 7, &[], "/srv")),
            ("bare", account(1001, 51, &[], "/")),
            ("4711", account(4711, 0, &[], "/")),
            (":staff", account(0, 50, &[], "/root")),
        ];
        for (word, expected) in table {
            assert_eq!(Account::of(word, root).unwrap(), expected, "{word:?}");
        }
        let error = |word| Account::of(word, root).unwrap_err();
        assert_eq!(error("nobody"), "its user is nobody, which its /etc/passwd does not have");
        assert_eq!(error("app:games"), "its group is games, which its /etc/group does not have");
        std::fs::remove_dir_all(root.join("usr")).unwrap();
        assert_eq!(Account::of("", root).unwrap(), account(0, 0, &[], "/root"), "an image without accounts");
    }
}
