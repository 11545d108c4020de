//! The system calls a sandbox may make: an allowlist, everything else is EPERM.
//!
//! It holds what ordinary programs (interpreters, compilers, servers, debuggers) need without any capability.
//! Left out on purpose: namespaces and mounts, modules, BPF, performance events, keyrings (not namespaced),
//! userfaultfd, file handles, clocks, swap, quotas, `syslog`, NUMA policy, and every other architecture's entry
//! points (a 32-bit program is killed: `socketcall` would hide its arguments from the filter).

use oci_spec::{
    OciSpecError,
    runtime::{
        Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompBuilder,
        LinuxSeccompOperator, LinuxSyscall, LinuxSyscallBuilder,
    },
};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// `CLONE_NEW*` except `CLONE_NEWTIME`, whose bit belongs to the exit signal in `clone` (only `clone3` and
/// `unshare` know it).
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Address families: local sockets, IPv4, IPv6 (absent, but asked for by every resolver).
const FAMILIES: [u64; 3] = [1, 2, 10];
const AF_NETLINK: u64 = 16;
const NETLINK_ROUTE: u64 = 0;

/// `personality` values: Linux, 32-bit address space, no randomisation (debuggers), both, and the query.
const PERSONALITIES: [u64; 5] = [0, 0x0002_0000, 0x0000_0008, 0x0002_0008, 0xffff_ffff];

/// Answered with ENOSYS, so that programs fall back: libc from `clone3` (whose arguments a filter cannot
/// see) to `clone`, event loops from io_uring (whose operations a filter cannot see) to epoll.
const ABSENT: &[&str] = &["clone3", "io_uring_enter", "io_uring_register", "io_uring_setup"];

const PROCESSES: &[&str] = &[
    "arch_prctl",
    "execve",
    "execveat",
    "exit",
    "exit_group",
    "fork",
    "get_robust_list",
    "get_thread_area",
    "getcpu",
    "getpgid",
    "getpgrp",
    "getpid",
    "getppid",
    "getpriority",
    "getrlimit",
    "getrusage",
    "getsid",
    "gettid",
    "kill",
    "pause",
    "pidfd_open",
    "pidfd_send_signal",
    "prctl",
    "prlimit64",
    "process_madvise",
    "process_mrelease",
    "restart_syscall",
    "rseq",
    "set_robust_list",
    "set_thread_area",
    "set_tid_address",
    "setpgid",
    "setpriority",
    "setrlimit",
    "setsid",
    "tgkill",
    "times",
    "tkill",
    "umask",
    "vfork",
    "wait4",
    "waitid",
];
/// A debugger's calls. The agent is not dumpable, so they do not reach it.
const DEBUGGING: &[&str] = &[
    "kcmp",
    "pidfd_getfd",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
];
const IDENTITY: &[&str] = &[
    "capget",
    "capset",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getresgid",
    "getresuid",
    "getuid",
    "landlock_add_rule",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "seccomp",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setuid",
];
const SIGNALS: &[&str] = &[
    "rt_sigaction",
    "rt_sigpending",
    "rt_sigprocmask",
    "rt_sigqueueinfo",
    "rt_sigreturn",
    "rt_sigsuspend",
    "rt_sigtimedwait",
    "rt_tgsigqueueinfo",
    "sigaltstack",
    "signalfd",
    "signalfd4",
];
const SCHEDULING: &[&str] = &[
    "ioprio_get",
    "ioprio_set",
    "sched_get_priority_max",
    "sched_get_priority_min",
    "sched_getaffinity",
    "sched_getattr",
    "sched_getparam",
    "sched_getscheduler",
    "sched_rr_get_interval",
    "sched_setaffinity",
    "sched_setattr",
    "sched_setparam",
    "sched_setscheduler",
    "sched_yield",
];
const MEMORY: &[&str] = &[
    "brk",
    "cachestat",
    "madvise",
    "map_shadow_stack",
    "membarrier",
    "memfd_create",
    "memfd_secret",
    "mincore",
    "mlock",
    "mlock2",
    "mlockall",
    "mmap",
    "mprotect",
    "mremap",
    "mseal",
    "msync",
    "munlock",
    "munlockall",
    "munmap",
    "pkey_alloc",
    "pkey_free",
    "pkey_mprotect",
    "remap_file_pages",
];
const TIME: &[&str] = &[
    "alarm",
    "clock_getres",
    "clock_gettime",
    "clock_nanosleep",
    "getitimer",
    "gettimeofday",
    "nanosleep",
    "setitimer",
    "time",
    "timer_create",
    "timer_delete",
    "timer_getoverrun",
    "timer_gettime",
    "timer_settime",
    "timerfd_create",
    "timerfd_gettime",
    "timerfd_settime",
];
const WAITING: &[&str] = &[
    "epoll_create",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "epoll_pwait2",
    "epoll_wait",
    "eventfd",
    "eventfd2",
    "futex",
    "futex_requeue",
    "futex_wait",
    "futex_waitv",
    "futex_wake",
    "poll",
    "ppoll",
    "pselect6",
    "select",
];
const DESCRIPTORS: &[&str] = &[
    "close",
    "close_range",
    "dup",
    "dup2",
    "dup3",
    "fcntl",
    "flock",
    "ioctl",
    "lseek",
    "pipe",
    "pipe2",
    "pread64",
    "preadv",
    "preadv2",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "read",
    "readahead",
    "readv",
    "splice",
    "tee",
    "vmsplice",
    "write",
    "writev",
];
const FILES: &[&str] = &[
    "access",
    "chdir",
    "chmod",
    "chown",
    "copy_file_range",
    "creat",
    "faccessat",
    "faccessat2",
    "fadvise64",
    "fallocate",
    "fchdir",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "fchown",
    "fchownat",
    "fdatasync",
    "fgetxattr",
    "flistxattr",
    "fremovexattr",
    "fsetxattr",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futimesat",
    "getcwd",
    "getdents",
    "getdents64",
    "getxattr",
    "inotify_add_watch",
    "inotify_init",
    "inotify_init1",
    "inotify_rm_watch",
    "lchown",
    "lgetxattr",
    "link",
    "linkat",
    "listxattr",
    "llistxattr",
    "lremovexattr",
    "lsetxattr",
    "lstat",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "readlink",
    "readlinkat",
    "removexattr",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "sendfile",
    "setxattr",
    "stat",
    "statfs",
    "statx",
    "symlink",
    "symlinkat",
    "sync",
    "sync_file_range",
    "syncfs",
    "truncate",
    "unlink",
    "unlinkat",
    "utime",
    "utimensat",
    "utimes",
];
const ASYNCHRONOUS_IO: &[&str] = &[
    "io_cancel",
    "io_destroy",
    "io_getevents",
    "io_pgetevents",
    "io_setup",
    "io_submit",
];
const SOCKETS: &[&str] = &[
    "accept",
    "accept4",
    "bind",
    "connect",
    "getpeername",
    "getsockname",
    "getsockopt",
    "listen",
    "recvfrom",
    "recvmmsg",
    "recvmsg",
    "sendmmsg",
    "sendmsg",
    "sendto",
    "setsockopt",
    "shutdown",
    "socketpair",
];
/// System V and POSIX message passing: private to the sandbox's IPC namespace.
const MESSAGES: &[&str] = &[
    "mq_getsetattr",
    "mq_notify",
    "mq_open",
    "mq_timedreceive",
    "mq_timedsend",
    "mq_unlink",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "shmat",
    "shmctl",
    "shmdt",
    "shmget",
];
const MACHINE: &[&str] = &["getrandom", "sysinfo", "uname"];

const ALLOWED: &[&[&str]] = &[
    PROCESSES,
    DEBUGGING,
    IDENTITY,
    SIGNALS,
    SCHEDULING,
    MEMORY,
    TIME,
    WAITING,
    DESCRIPTORS,
    FILES,
    ASYNCHRONOUS_IO,
    SOCKETS,
    MESSAGES,
    MACHINE,
];

/// Builds the profile.
///
/// # Errors
/// Never with this crate's own constants; the builder's type asks for it.
pub(super) fn profile() -> Result<LinuxSeccomp, OciSpecError> {
    let mut rules = vec![
        rule(
            &ALLOWED.concat(),
            LinuxSeccompAction::ScmpActAllow,
            None,
            Vec::new(),
        )?,
        rule(ABSENT, LinuxSeccompAction::ScmpActErrno, Some(ENOSYS), Vec::new())?,
        rule(
            &["clone"],
            LinuxSeccompAction::ScmpActAllow,
            None,
            vec![masked(0, CLONE_NAMESPACES, 0)?],
        )?,
    ];
    for family in FAMILIES {
        rules.push(rule(
            &["socket"],
            LinuxSeccompAction::ScmpActAllow,
            None,
            vec![equal(0, family)?],
        )?);
    }
    let route = vec![equal(0, AF_NETLINK)?, equal(2, NETLINK_ROUTE)?];
    rules.push(rule(&["socket"], LinuxSeccompAction::ScmpActAllow, None, route)?);
    for value in PERSONALITIES {
        rules.push(rule(
            &["personality"],
            LinuxSeccompAction::ScmpActAllow,
            None,
            vec![equal(0, value)?],
        )?);
    }
    LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .default_errno_ret(EPERM)
        .architectures(vec![native()])
        .syscalls(rules)
        .build()
}

fn native() -> Arch {
    if cfg!(target_arch = "aarch64") {
        Arch::ScmpArchAarch64
    } else {
        Arch::ScmpArchX86_64
    }
}

fn rule(
    names: &[&str],
    action: LinuxSeccompAction,
    errno: Option<u32>,
    arguments: Vec<LinuxSeccompArg>,
) -> Result<LinuxSyscall, OciSpecError> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let mut rule = LinuxSyscallBuilder::default().names(names).action(action);
    if let Some(errno) = errno {
        rule = rule.errno_ret(errno);
    }
    if !arguments.is_empty() {
        rule = rule.args(arguments);
    }
    rule.build()
}

fn equal(index: usize, value: u64) -> Result<LinuxSeccompArg, OciSpecError> {
    let argument = LinuxSeccompArgBuilder::default().index(index).value(value);
    argument.op(LinuxSeccompOperator::ScmpCmpEq).build()
}

fn masked(index: usize, mask: u64, value: u64) -> Result<LinuxSeccompArg, OciSpecError> {
    let argument = LinuxSeccompArgBuilder::default()
        .index(index)
        .value(mask)
        .value_two(value);
    argument.op(LinuxSeccompOperator::ScmpCmpMaskedEq).build()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What turned containers into hosts before, and what nobody in here needs.
    const NEVER: &[&str] = &[
        "acct",
        "add_key",
        "adjtimex",
        "bpf",
        "chroot",
        "clock_adjtime",
        "clock_settime",
        "delete_module",
        "fanotify_init",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "init_module",
        "ioperm",
        "iopl",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "mbind",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "open_by_handle_at",
        "open_tree",
        "perf_event_open",
        "pivot_root",
        "quotactl",
        "reboot",
        "request_key",
        "set_mempolicy",
        "setdomainname",
        "sethostname",
        "setns",
        "settimeofday",
        "swapoff",
        "swapon",
        "syslog",
        "umount2",
        "unshare",
        "userfaultfd",
        "vhangup",
    ];

    #[test]
    fn privileged_calls_are_nowhere_allowed() {
        let profile = profile().unwrap();
        assert_eq!(profile.default_action(), LinuxSeccompAction::ScmpActErrno);
        let allowed: BTreeSet<&str> = profile
            .syscalls()
            .iter()
            .flatten()
            .filter(|rule| rule.action() == LinuxSeccompAction::ScmpActAllow)
            .flat_map(|rule| rule.names().iter().map(String::as_str))
            .collect();
        for name in NEVER.iter().chain(ABSENT) {
            assert!(!allowed.contains(name), "{name} is allowed");
        }
    }

    #[test]
    fn conditional_calls_are_not_allowed_without_condition() {
        let all = ALLOWED.concat();
        for name in ["clone", "socket", "personality"] {
            assert!(!all.contains(&name), "{name} is allowed whatever its arguments");
        }
        let distinct: BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(distinct.len(), all.len(), "a call is listed twice");
    }
}
