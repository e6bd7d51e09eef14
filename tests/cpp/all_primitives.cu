// Kernels that call every primitive of csrc/cuda/device.h: that the assembler takes them, for sm_80
// and, with -DWITH_HOPPER, for sm_90a.
#include "../../csrc/cuda/device.h"

struct Everywhere {
  struct Args {
    float* out;
    const unsigned char* in;
  };
  static constexpr int THREADS = 128, BLOCKS = 2;
  static DEVICE void body(const Args& args) {
    using namespace device;
    copy16(shared() + 16 * thread(), args.in + 16 * thread(), thread() % 17);
    copy_commit();
    copy_wait<1>();
    copy_wait<0>();
    sync();
    uint32_t a[4], b[4];
    load_matrices(a, shared() + 16 * (thread() % 32));
    load_matrices_transposed(b, shared() + 16 * (thread() % 32));
    float c[4] = {};
    mma_bf16(c, a, b[0], b[1]);
    mma_f16(c, a, b[2], b[3]);
    mma_tf32(c, a, b[0], b[3]);
    sync_warp();
    const float x = shuffle_xor(c[0], 1) + from_f16(uint16_t(pack_f16(c[1], c[2]) >> 16)) + from_bits(pack_bf16(c[3], c[2]));
    const float y = exp2_approx(x) + from_bits(to_bits(x) ^ 1) + float(shuffle_xor(double(x), 2));
    args.out[block_x() + 4 * block_y() + uniform(thread() / 32)] = device::any(y > 0) ? y : x;
  }
};

// The compiler is to see a call for each N, not its meaning.
template <device::Factors TYPE, int N, int TRANS_B> DEVICE float products(const float* out) {
  using namespace device;
  float c[N / 2];
  for (float& x : c) x = out[thread()];
  const uint64_t a = matrix_descriptor(shared(), 0, 1024), b = matrix_descriptor(shared() + 8192, 8192, 1024);
  const uint32_t left[4] = {pack_bf16(out[0], out[1]), 1, 2, 3};
  hold_registers(c);
  operands_written();
  product_begin();
  product_ss<TYPE, N, TRANS_B>(c, a, b, 0);
  product_ss<TYPE, N, TRANS_B>(c, a + 2, b + 2, 1);
  product_commit();
  product_rs<TYPE, N, TRANS_B>(c, left, b, 1);
  product_commit();
  product_wait<1>();
  product_wait<0>();
  hold_registers(c);
  float sum = 0;
  for (float x : c) sum += x;
  return sum;
}

struct Hopper {
  struct Args {
    float* out;
    device::TensorMap map;
  };
  static constexpr int THREADS = 256, BLOCKS = 1;
  static DEVICE void body(const Args& args) {
    using namespace device;
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared());
    if (thread() == 0) {
      barrier_init(barrier, 1);
      barrier_init(barrier + 1, 128);
      barrier_publish();
    }
    sync();
    if (thread() >= 128) {
      registers_less<24>();
      if (thread() == 128) {
        barrier_wait(barrier + 1, 1);
        barrier_expect(barrier, 8192);
        tensor_copy(shared() + 1024, &args.map, 0, 64, barrier);
      }
    } else {
      registers_more<240>();
      barrier_wait(barrier, 0);
      args.out[thread()] = products<Factors::BF16, 64, 0>(args.out) + products<Factors::BF16, 64, 1>(args.out) +
                           products<Factors::BF16, 128, 0>(args.out) + products<Factors::BF16, 128, 1>(args.out) +
                           products<Factors::BF16, 256, 0>(args.out) + products<Factors::BF16, 256, 1>(args.out) +
                           products<Factors::F16, 64, 0>(args.out) + products<Factors::F16, 64, 1>(args.out) +
                           products<Factors::F16, 128, 0>(args.out) + products<Factors::F16, 256, 1>(args.out) +
                           products<Factors::TF32, 64, 0>(args.out) + products<Factors::TF32, 128, 0>(args.out) +
                           products<Factors::TF32, 256, 0>(args.out);
      sync_some(1, 128);
      barrier_arrive(barrier + 1);
    }
  }
};

const char* everywhere(const Everywhere::Args& args) { return device::launch<Everywhere>(1, 1, 4096, args, nullptr); }
#ifdef WITH_HOPPER
const char* hopper(const Hopper::Args& args) { return device::launch<Hopper>(1, 1, 65536, args, nullptr); }
#endif
