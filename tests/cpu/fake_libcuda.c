// The calls of libcuda that `worker.graph_nodes` makes, with the declarations of cuda.h, over a graph that a test builds.
#include <stddef.h>
#include <stdint.h>

struct node { int type; const char *name; int is_kern; };
typedef struct {
  void *func;
  unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  void **kernelParams;
  void **extra;
  void *kern;
  void *ctx;
} CUDA_KERNEL_NODE_PARAMS_v2;

static struct node nodes[64];
static size_t num_nodes;
static int graph, failing, lossy;
static void *const stream = (void *)0x1234567890ab;

void fake_add(int type, const char *name, int is_kern) { nodes[num_nodes++] = (struct node){type, name, is_kern}; }
void fake_fail(int code) { failing = code; }
void fake_dependent(void) { lossy = 1; }
void fake_clear(void) { num_nodes = 0; failing = lossy = 0; }

int cuStreamGetCaptureInfo_v3(void *of, int *status, uint64_t *id, void **made, void *const **before, const void **edges, size_t *count) {
  *status = of == stream;
  if (!*status) return 0;
  if (lossy && !edges) return 918; // CUDA_ERROR_LOSSY_QUERY
  *id = 7, *made = &graph, *before = NULL, *edges = NULL, *count = 0;
  return 0;
}

int cuGraphGetNodes(void *of, void **found, size_t *count) {
  if (of != &graph) return 1;
  if (!found) { *count = num_nodes; return 0; }
  for (size_t i = 0; i < *count; i++) found[i] = &nodes[num_nodes - 1 - i]; // no order is promised
  return failing;
}

int cuGraphNodeGetType(void *node, int *type) { *type = ((struct node *)node)->type; return 0; }

int cuGraphKernelNodeGetParams_v2(void *node, CUDA_KERNEL_NODE_PARAMS_v2 *params) {
  struct node *one = node;
  if (one->type) return 1;
  *params = (CUDA_KERNEL_NODE_PARAMS_v2){one->is_kern ? NULL : node, 1, 2, 3, 4, 5, 6, 7, NULL, NULL, one->is_kern ? node : NULL, NULL};
  return 0;
}

int cuFuncGetName(const char **name, void *func) { *name = ((struct node *)func)->name; return ((struct node *)func)->is_kern; }
int cuKernelGetName(const char **name, void *kern) { *name = ((struct node *)kern)->name; return !((struct node *)kern)->is_kern; }
