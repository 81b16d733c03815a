//! The texts that determine the content of an image that is built from packages. They are a part of the image's key.
//! The crate `xtask-images` runs the scripts. The texts are in this crate, because the host checks look for the image
//! in the cache before they require the programs that only a build needs.

/// The packages with the tools that maintainer scripts and update-initramfs call, and the packages on which these
/// depend.
pub const TOOLS: &str = "bash,coreutils,cpio,dash,debianutils,diffutils,dpkg,findutils,grep,gzip,hostname,init-system-helpers,kmod,\
                     libc-bin,mawk,openssh-client,openssl,passwd,perl-base,python3-minimal,sed,tar,util-linux,xz-utils,zstd";

/// The scripts, in the order in which the key contains them.
pub const SCRIPTS: &[&str] = &[
    include_str!("../../../images/src/build/ahead.sh"),
    include_str!("../../../images/src/build/store.sh"),
    include_str!("../../../images/src/build/later.sh"),
    include_str!("../../../images/src/build/finish.sh"),
    include_str!("../../../images/src/build/accelerate.sh"),
    TOOLS,
    include_str!("../../../images/src/build/customize.sh"),
    include_str!("../../../images/src/build/initramfs.sh"),
    include_str!("../../../images/src/build/restore.sh"),
    include_str!("../../../images/src/build/assemble.sh"),
];
