// The GPU features that kernel bodies may use. Nothing else of CUDA appears in them, so a compiler
// for the host can build the same bodies. device_gpu.h implements it by PTX,
// tests/emulator/device_host.h by fibres (ALPHACL_EMULATED).
//
//   thread(), block_x(), block_y()        position; lanes are threads modulo 32
//   shared()                              the block's dynamic shared memory, aligned to 1024 bytes
//   sync()                                barrier of all threads of the block
//   sync_warp()                           barrier of a warp, after which its writes to shared memory are seen by its lanes
//   shuffle_xor(x, mask)                  the value of lane ^ mask; all 32 lanes take part
//   uniform(x)                            x, which is the same in all lanes, and the compiler is to know it
//   any(x)                                whether x is true in some lane of the warp; all 32 lanes take part
//   copy16(to, from, bytes)               asynchronous copy of 16 bytes, 16-byte aligned, from global to shared memory; beyond
//                                         the first `bytes` (0 … 16) nothing is read and zeros are written
//   copy_commit(), copy_wait<N>()         closes a group of a thread's copies; waits until all but the last N groups are done
//   load_matrices(r, row)                 ldmatrix.x4: lane 8m + k gives the address (16-byte aligned) of row k of the 8 × 8
//                                         matrix m of 16-bit elements; r[m] holds elements 2·(lane % 4) and the next of row
//                                         lane / 4 of matrix m
//   load_matrices_transposed(r, row)      the same with each matrix transposed (.trans)
//   mma_bf16, mma_f16 (c, a, b)           m16n8k16, row · col, float accumulators; fragments as the PTX manual defines them
//   mma_tf32(c, a, b)                     m16n8k8; operands are float bit patterns, of which the low 13 bits are not read
//   pack_bf16(low, high), pack_f16        two floats rounded to nearest even, the first in the low half
//   exp2_approx                           one instruction; denormal operands and results are 0
//   from_f16(bits), from_bits, to_bits    a float16's value; the bit pattern of a float or double, and back
//   rounded_to_tf32(x)                    a float's bit pattern with 10 bits of mantissa; NaN stays NaN
//
// A kernel is a struct K with `Args`, `THREADS`, `BLOCKS` (at least so many resident on a
// multiprocessor) and a static `body(const Args&)`; launch<K>(grid_x, grid_y, shared_bytes, args,
// stream) starts it and returns null or what went wrong; why_not<K>() says why the current device
// cannot run it, or null.
//
// Only for sm_90a (hopper.h):
//   barrier_init(b, arrivals), barrier_publish()       mbarrier in shared memory; the fence after all inits, before sync()
//   barrier_arrive(b), barrier_expect(b, bytes)        one arrival; one arrival that announces bytes of tensor copies
//   barrier_wait(b, parity)                            until the phase of that parity (0 first) is complete
//   tensor_copy(to, map, x, y, b)                      one box of a two-dimensional tensor map (element offset x in the row,
//                                                      row y) to shared memory, 128-byte swizzle, zeros outside; counts on b
//   matrix_descriptor(start, leading, stride)          wgmma operand in shared memory, 128-byte swizzle; bytes
//   operands_written()                                 what this thread wrote to shared memory may be read by products of
//                                                      those whom it tells so
//   product_ss<TYPE, N, TRANS_B>(c, a, b, add)         wgmma m64nNk16 of bfloat16 or float16 (Factors::BF16, F16), m64nNk8 of
//                                                      float bit patterns without their low 13 bits (Factors::TF32, where B
//                                                      cannot be transposed); A and B by descriptors; c[N/2]; add = 0 overwrites
//   product_rs<TYPE, N, TRANS_B>(c, a, b, add)         A from registers (uint32_t[4])
//   product_begin(), product_commit(), product_wait<N>()   wgmma.fence, commit_group, wait_group
//   hold_registers(x)                                  the compiler moves no use of x[N] from one side of this to the other
//   registers_more<N>(), registers_less<N>()           setmaxnreg of a warpgroup
//   sync_some(id, threads)                             named barrier 1 … 15
//
// and for the host: tensor_map(map, base, columns, rows, pitch, box_rows) describes a tensor of
// 16-bit elements (a float is two), `pitch` bytes from row to row, for boxes of 64 columns × box_rows, and
// returns null or what went wrong. HOPPER says whether the code that is being compiled may use all this,
// runs_hopper<K>() whether the current device would run a K that was compiled so.
#pragma once

#include <cstdint>

#ifdef ALPHACL_EMULATED
#include "../../tests/emulator/device_host.h"
#else
#include "device_gpu.h"
#endif
