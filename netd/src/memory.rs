//! netd's own memory. Owns: giving back what reading frames took, and what the rules took that they replaced: the allocator
//! would keep it for others that may never come.

/// Gives back what is not in use.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "malloc_trim has no safe form")]
        // SAFETY: malloc_trim(3) is MT-Safe, and touches nothing that is in use.
        let _trimmed = unsafe { libc::malloc_trim(0) };
    }
}
