//! The libvirt that `preflight --connect` names: asked for facts, and nothing of it changed. Beside `hypervisor.rs`, which
//! has the runs' own, the only file that names `virt::`.

use virt::connect::Connect;
use virt::error::{Error, ErrorNumber};
use virt::network::Network as VirtNetwork;
use virt::storage_pool::StoragePool;
use xtask_core::arch::{Accelerator, VmArchitecture};
use xtask_core::cli::MachineArgs;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::preflight::remote::capabilities::{self, GuestOffer};
use xtask_core::preflight::remote::refusal::Refusal;
use xtask_core::preflight::remote::{
    Access, ConnectionFacts, ConnectionOffer, DEFAULT, DomainAnswer, Network, Node, Pool, accelerator,
};

/// What is being asked now, for whoever waits.
pub(crate) type OnQuestion<'a> = &'a dyn Fn(&'static str);

/// Asks everything; as long as the other side takes.
pub(crate) fn gather(
    uri: &ConnectUri,
    architectures: &[VmArchitecture],
    machine: &MachineArgs,
    progress: OnQuestion<'_>,
) -> ConnectionFacts {
    // Its errors come back as values; by default libvirt prints them as well.
    virt::error::clear_error_callback();
    progress("open the connection");
    let answer = open(uri).map(|(connect, access)| offer(&connect, access, architectures, machine, progress));
    ConnectionFacts { uri: uri.clone(), answer }
}

/// Read-write where that is allowed, else read-only.
fn open(uri: &ConnectUri) -> Result<(Connect, Access), Refusal> {
    let name = uri.for_libvirt();
    let refused = match Connect::open(Some(&name)) {
        Ok(connect) => {
            let access = access(&connect);
            return Ok((connect, access));
        }
        Err(error) => words(error),
    };
    let refusal = Refusal::Message(refused.clone());
    if !refusal.is_permission(uri) {
        return Err(refusal);
    }
    Connect::open_read_only(Some(&name)).map(|connect| (connect, Access::ReadOnly(refused))).or(Err(refusal))
}

/// A read-only socket takes a read-write connection and refuses what would change something. So something is asked for
/// that can never be: a domain without a name, which libvirt refuses in either case, for one reason or the other.
fn access(connect: &Connect) -> Access {
    const NO_DOMAIN: &str = "<domain/>";
    let forbidden = [
        ErrorNumber::OperationDenied,
        ErrorNumber::AccessDenied,
        ErrorNumber::AuthFailed,
        ErrorNumber::AuthUnavailable,
    ];
    match connect.create_domain_xml(NO_DOMAIN, 0) {
        Err(error) if forbidden.iter().any(|number| error.code() == (*number).into()) => {
            Access::ReadOnly(error.message().to_owned())
        }
        _ => Access::Full,
    }
}

fn offer(
    connect: &Connect,
    access: Access,
    architectures: &[VmArchitecture],
    machine: &MachineArgs,
    progress: OnQuestion<'_>,
) -> ConnectionOffer {
    progress("describe its host");
    let node = connect
        .node_info()
        .map(|info| Node { machine: info.model, cpus: info.cpus, memory: info.memory * 1024 })
        .map_err(words);
    let (host_name, libvirt) =
        (connect.hostname().map_err(words), connect.lib_version().map(version).map_err(words));
    let hypervisor = connect
        .driver_type()
        .and_then(|driver| Ok(format!("{driver} {}", version(connect.hyp_version()?))))
        .map_err(words);
    let free_memory = free_memory(connect).map_err(words);
    progress("list the guests that it runs");
    let guests = connect.capabilities().map_err(words).and_then(|xml| capabilities::guests(&xml));
    progress("describe what its guests can have");
    let known = guests.as_deref().unwrap_or_default();
    // No answer to whoever may only look (CVE-2019-10167).
    let asked = if access == Access::Full { architectures } else { &[] };
    let domains = asked.iter().filter_map(|arch| domain(connect, known, *arch, machine)).collect();
    progress("look up its network");
    let network =
        found(connect.lookup_network_by_name(DEFAULT), ErrorNumber::NoNetwork).and_then(described_network);
    progress("look up its storage pool");
    let pool = found(connect.lookup_storage_pool_by_name(DEFAULT), ErrorNumber::NoStoragePool)
        .and_then(described_pool);
    ConnectionOffer {
        access,
        hypervisor,
        libvirt,
        host_name,
        node,
        free_memory,
        guests,
        domains,
        network,
        pool,
    }
}

fn domain(
    connect: &Connect,
    guests: &[GuestOffer],
    arch: VmArchitecture,
    machine: &MachineArgs,
) -> Option<DomainAnswer> {
    let profile = arch.profile();
    let guest = guests.iter().find(|guest| guest.machine == profile.machine)?;
    let accelerator = accelerator(machine.accel, guest);
    let kind = match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "qemu",
    };
    let asked =
        connect.domain_capabilities(None, Some(profile.machine), Some(profile.machine_type), Some(kind), 0);
    Some(DomainAnswer {
        arch,
        accelerator,
        offer: asked.map_err(words).and_then(|xml| capabilities::domain(&xml)),
    })
}

/// What was looked up by its name, `None` where `none` says that there is no such thing.
fn found<T>(result: Result<T, Error>, none: ErrorNumber) -> Result<Option<T>, String> {
    match result {
        Ok(thing) => Ok(Some(thing)),
        Err(error) if error.code() == none.into() => Ok(None),
        Err(error) => Err(words(error)),
    }
}

fn described_network(network: Option<VirtNetwork>) -> Result<Option<Network>, String> {
    let Some(network) = network else { return Ok(None) };
    let active = network.is_active().map_err(words)?;
    // A network without a definition on disk has no autostart, which is an error and the answer.
    Ok(Some(Network { active, autostart: network.autostart().unwrap_or(false) }))
}

fn described_pool(pool: Option<StoragePool>) -> Result<Option<Pool>, String> {
    let Some(pool) = pool else { return Ok(None) };
    let active = pool.is_active().map_err(words)?;
    let free = if active { pool.info().map_err(words)?.available } else { 0 };
    Ok(Some(Pool { active, free }))
}

/// Bytes. virNodeGetFreeMemory leaves out the page cache, which on a host that has run for a day is most of what a new
/// guest can have; the crate virt 0.5.0 does not have the call that tells it apart.
fn free_memory(connect: &Connect) -> Result<u64, Error> {
    memory_stats(connect).map_or_else(
        || connect.free_memory(),
        |stats| {
            let counted = ["free", "buffers", "cached"];
            Ok(stats
                .iter()
                .filter(|(name, _)| counted.contains(&name.as_str()))
                .map(|(_, kib)| kib * 1024)
                .sum())
        },
    )
}

/// What virNodeGetMemoryStats tells, in KiB; `None` where the driver has no such call.
fn memory_stats(connect: &Connect) -> Option<Vec<(String, u64)>> {
    let mut count = 0;
    let ask = |stats: *mut virt::sys::virNodeMemoryStats, count: &mut _| {
        // SAFETY: the connection lives as long as `connect`; `stats` is null, which asks for the count alone, or has room
        // for `count` entries.
        let result = unsafe { virt::sys::virNodeGetMemoryStats(connect.as_ptr(), -1, stats, count, 0) };
        (result == 0).then_some(())
    };
    ask(std::ptr::null_mut(), &mut count)?;
    let empty = virt::sys::virNodeMemoryStats { field: [0; 80], value: 0 };
    let mut stats = vec![empty; usize::try_from(count).ok()?];
    ask(stats.as_mut_ptr(), &mut count)?;
    stats.truncate(usize::try_from(count).ok()?);
    let name = |field: &[std::ffi::c_char]| {
        field.iter().take_while(|c| **c != 0).map(|c| char::from(c.cast_unsigned())).collect::<String>()
    };
    Some(stats.iter().map(|entry| (name(&entry.field), entry.value)).collect())
}

/// libvirt's numbers are major × 1 000 000 + minor × 1 000 + release.
fn version(number: u32) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000)
}

#[expect(clippy::needless_pass_by_value, reason = "what map_err hands over")]
fn words(error: Error) -> String {
    error.message().to_owned()
}
