//! The packet's buffer, as the programs see it. Outside the kernel it is a copy in memory, so that the reading of packets
//! can be tried with any bytes.

#[cfg(target_arch = "bpf")]
pub use aya_ebpf::programs::TcContext;
#[cfg(not(target_arch = "bpf"))]
pub use host::TcContext;

/// Whether a VLAN tag was moved out of the frame into the buffer's description.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub fn is_tagged(ctx: &TcContext) -> bool {
    // SAFETY: the context of a classifier.
    unsafe { (*ctx.skb.skb).vlan_present != 0 }
}

#[cfg(not(target_arch = "bpf"))]
pub use host::is_tagged;

#[cfg(not(target_arch = "bpf"))]
mod host {
    use core::cell::Cell;

    /// Longest frame.
    const FRAME_MAX: usize = 2048;
    /// The kernel puts a frame where the IP header is aligned.
    const BEFORE: usize = 2;

    #[repr(align(8))]
    struct Aligned([u8; BEFORE + FRAME_MAX]);

    /// A frame. As in the kernel, only its first bytes need be readable until more are asked for.
    pub struct TcContext {
        buffer: Aligned,
        length: usize,
        readable: Cell<usize>,
        is_tagged: bool,
    }

    impl TcContext {
        /// A copy of a frame, of which so many bytes are readable. Nothing where it is too long.
        pub fn new(frame: &[u8], readable: usize, is_tagged: bool) -> Option<Self> {
            let mut buffer = Aligned([0; BEFORE + FRAME_MAX]);
            buffer
                .0
                .get_mut(BEFORE..BEFORE + frame.len())?
                .copy_from_slice(frame);
            Some(Self {
                buffer,
                length: frame.len(),
                readable: Cell::new(readable.min(frame.len())),
                is_tagged,
            })
        }

        /// Where the frame begins.
        pub fn data(&self) -> usize {
            self.buffer.0[BEFORE..].as_ptr() as usize
        }

        /// Where its readable part ends.
        pub fn data_end(&self) -> usize {
            self.data() + self.readable.get()
        }

        /// Bytes of the frame.
        #[expect(clippy::len_without_is_empty, reason = "it has what the kernel's has")]
        pub fn len(&self) -> u32 {
            self.length as u32
        }

        /// Makes the first `length` bytes readable.
        ///
        /// # Errors
        /// When there are not so many.
        pub fn pull_data(&self, length: u32) -> Result<(), i32> {
            if length > self.len() {
                return Err(-22);
            }
            self.readable.set(self.readable.get().max(length as usize));
            Ok(())
        }
    }

    /// Whether a VLAN tag was moved out of the frame into the buffer's description.
    pub fn is_tagged(ctx: &TcContext) -> bool {
        ctx.is_tagged
    }
}
