//! Checks whether this process can mount file systems as an image build does.

use super::tools;

/// Returns whether this process can have mounts that no other process sees. This is impossible in a chroot whose root
/// is not a mount point. There, unshare(1) fails (mount(2), EINVAL), because it first makes the mount at `/` private.
pub fn can_have_own_mounts() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    root_is_a_mount(&mounts)
}

fn root_is_a_mount(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| line.split(' ').nth(4) == Some("/"))
}

/// Returns the reason why this user cannot mount a file system in a namespace, as an image build does. The function
/// mounts a tmpfs there, because this can fail for several reasons: missing capabilities or subordinate ids, sysctls,
/// or AppArmor. Ubuntu 24.04 allows user namespaces and then denies mounts in them.
pub(super) fn refusal() -> Option<String> {
    let (unshare, mount) = (tools::find("unshare")?, tools::find("mount")?);
    let mount = mount.to_str()?;
    let namespace: &[&str] =
        if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user", "--map-auto"] };
    let attempt: &[&str] = match (can_have_own_mounts(), namespace) {
        (true, _) => &["--mount", mount, "--no-mtab", "-t", "tmpfs", "tmpfs", "/tmp"],
        // In such a chroot, root builds without a namespace of its own. An attempt would change the mounts of others.
        (false, []) => return None,
        (false, _) => &["true"],
    };
    tools::read(&unshare, &[namespace, attempt].concat()).err().map(|error| format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chroot_has_no_mounts_of_its_own() {
        assert!(root_is_a_mount(
            "29 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n30 29 0:21 / /proc rw - proc proc rw\n"
        ));
        assert!(!root_is_a_mount("30 29 0:21 / /proc rw - proc proc rw\n"));
    }
}
