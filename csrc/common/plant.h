// Planted bugs: proof that the tests see what they are there to see.
//
// MNET_PLANT(n, right, wrong) is `right`.  Only where ctest compiles the kernels with MNET_PLANTS is it `wrong` while
// `planted` is n (the environment's MNET_PLANT); ctest finds every n in the source and runs the kernel's test program
// with it, and a run that still passes is an error.  n is unique among the files of one kernel and one folder.
#pragma once

#if defined(MNET_PLANTS)
namespace mnet {
extern const int planted;  // tests/support/planted.cpp
}
#define MNET_PLANT(n, right, wrong) (::mnet::planted == (n) ? (wrong) : (right))
#else
#define MNET_PLANT(n, right, wrong) (right)
#endif
